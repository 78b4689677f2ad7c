"""Where stock Lightning and torch_npu go wrong on NPUs, and what this package does about it: a test for each.

Below, under each place in Lightning or torch_npu, stand the tests that cover it; ``::`` means this file. One of the
tests here checks that they all exist.

accelerator names
    devices/test_devices.py::test_importing_the_package_makes_the_names_known_and_does_not_import_torch_npu
    devices/test_devices.py::test_names_can_be_registered_again
    devices/test_one_device.py::test_devices_are_the_ones_asked_for
    devices/test_facts.py::test_auto_and_gpu_do_not_mean_the_npu
choice of the strategy for one device
    devices/test_one_device.py::test_without_the_strategy_the_trainer_refuses_instead_of_using_the_cpu
    devices/test_facts.py::test_no_entry_point_and_no_precision_ends_on_the_cpu
    devices/test_facts.py::test_a_strategy_of_lightning_is_refused_with_what_to_write
    devices/test_one_device.py::test_a_strategy_of_the_user_is_not_refused_but_mixed_precision_for_cuda_is
    test_fabric.py::test_without_the_strategy_nothing_runs_on_the_cpu
DDPStrategy asks CUDA for a stream
    devices/test_many_devices.py::test_two_devices_equal_two_cpu_processes
    test_fabric.py::test_two_devices_average_gradients
    devices/test_facts.py::test_two_devices_without_a_strategy_are_refused_with_what_to_write
    devices/test_facts.py::test_a_strategy_made_from_ddp_is_refused_unless_it_wraps_by_itself
    test_fabric.py::test_the_strategy_for_cuda_fails_loudly
mean of an integer tensor
    devices/test_many_devices.py::test_reductions_are_right_for_every_dtype
    devices/test_many_devices.py::test_a_metric_of_integers_is_averaged_over_ranks
mixed precision for CUDA
    devices/test_one_device.py::test_precision_has_the_effect_it_has_on_the_cpu
    test_precision.py::test_losses_and_record_are_those_of_the_same_precision_on_the_cpu
    test_precision.py::test_mixed_float16_is_near_float32
    test_precision.py::test_mixed_float16_says_nothing_about_cuda
    test_precision.py::test_steps_whose_gradients_overflow_are_skipped_for_weights_and_factors
    test_settings.py::test_the_choice_of_lightning_is_replaced_by_the_twin_for_npus
    test_fabric.py::test_mixed_precision_casts_on_the_npu
    fsdp/test_setups.py::test_precision
communication hooks
    devices/test_many_devices.py::test_communication_hooks_compress_gradients
ModelParallelStrategy binds the process group to a device
    devices/test_facts.py::test_the_model_parallel_strategy_of_lightning_fails_loudly
    devices/test_facts.py::test_the_model_parallel_strategy_of_lightning_is_refused_on_one_device
    devices/test_many_devices.py::test_decisions_objects_and_further_groups
    fsdp/test_fsdp.py::test_losses_and_record_are_those_of_copies
    fsdp/test_checkpoints.py::test_a_resumed_training_is_the_uninterrupted_one
FSDPStrategy
    devices/test_facts.py::test_fsdp_of_lightning_is_refused_when_the_trainer_is_made
random generators
    devices/test_one_device.py::test_the_sanity_check_does_not_change_the_training
    devices/test_one_device.py::test_resuming_continues_with_the_random_numbers_of_the_checkpoint
    devices/test_many_devices.py::test_random_numbers_of_every_rank_are_in_the_checkpoint
out of memory
    devices/test_one_device.py::test_the_batch_size_finder_recognises_that_memory_is_exhausted
    devices/test_one_device.py::test_outside_of_the_finder_the_error_is_still_the_one_of_the_device
checkpoints without torch_npu
    devices/test_many_devices.py::test_two_devices_equal_two_cpu_processes
    devices/test_one_device.py::test_a_checkpoint_of_the_cpu_resumes_on_the_npu_and_the_reverse
    test_fabric.py::test_checkpoints_hold_cpu_tensors_and_load_again
device of a module
    devices/test_one_device.py::test_the_device_of_a_module_follows_the_method_npu
fork
    devices/test_one_device.py::test_fork_is_refused_once_a_device_is_in_use
float64
    devices/test_one_device.py::test_float64_is_refused_when_the_trainer_is_made
    test_fabric.py::test_float64_and_other_accelerators_are_refused
    devices/test_facts.py::test_float64_in_metrics_and_losses_works_on_two_devices
    devices/test_facts.py::test_a_model_in_float64_on_two_devices_is_explained
    ../ascend_sim/test_collectives.py::test_double_is_refused_by_the_backend
fine: optimizer state, batch transfer
    devices/test_one_device.py::test_model_optimizer_and_batches_are_on_the_device_and_the_model_returns
fine: DeviceStatsMonitor
    devices/test_one_device.py::test_device_stats_monitor_logs_them
    devices/test_one_device.py::test_statistics_of_allocator_and_npu_smi
fine: SyncBatchNorm
    devices/test_many_devices.py::test_synchronised_batch_norm_equals_one_process_with_the_whole_batch
fine: resume
    devices/test_one_device.py::test_resuming_continues_with_the_random_numbers_of_the_checkpoint
fine: profilers
    devices/test_facts.py::test_profilers_of_lightning_see_the_training
fine: bf16-true
    test_precision.py::test_losses_and_record_are_those_of_the_same_precision_on_the_cpu
    test_precision.py::test_factors_are_float32_in_the_checkpoint_whatever_the_weights_are
fine: backend of the process group
    devices/test_many_devices.py::test_decisions_objects_and_further_groups
native operators
    ../ascend_sim/test_native_operators.py::test_the_list_is_of_the_wheel_and_not_of_the_simulation
channels_last
    devices/test_facts.py::test_a_channels_last_tensor_on_the_device_is_explained
    devices/test_facts.py::test_a_model_made_channels_last_on_the_cpu_trains
no device can be used
    devices/test_devices.py::test_without_torch_npu_the_command_that_installs_it_is_given
    devices/test_devices.py::test_a_version_that_does_not_fit_is_named
    devices/test_devices.py::test_the_real_wheel_without_cann_names_the_script_to_source
    devices/test_devices.py::test_no_visible_device_is_explained
    devices/test_devices.py::test_a_device_in_use_elsewhere_is_explained
nothing changes without an NPU
    devices/test_devices.py::test_importing_the_package_makes_the_names_known_and_does_not_import_torch_npu
    ::test_training_on_the_cpu_of_a_machine_with_npus_changes_nothing
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from tests.ascend.training import fit

ROOT = Path(__file__).parents[2]


def facts() -> dict[str, list[str]]:
    """The table in the description of this file: the places with their tests, as paths from the repository's root."""
    table: dict[str, list[str]] = {}
    for line in (__doc__ or "").partition("exist.\n\n")[2].splitlines():
        if not line.startswith(" "):
            table[line] = []
            continue
        file, _, name = line.strip().partition("::")
        path = (Path(__file__).parent / (file or Path(__file__).name)).resolve()
        table[list(table)[-1]].append(f"{path.relative_to(ROOT)}::{name}")
    return table


def test_every_place_has_tests_and_every_test_named_here_exists() -> None:
    assert len(facts()) == 25
    assert all(facts().values())
    named = {test for tests in facts().values() for test in tests}
    files = {test.partition("::")[0] for test in named}
    assert named - {test for file in files for test in functions_of(file)} == set()


def functions_of(file: str) -> set[str]:
    """The tests of a file by its source; to let pytest collect them, a process would import all libraries."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return {f"{file}::{name}" for name in functions if name.startswith("test_")}


class BeforeTheFirstStep(pl.Callback):
    """At that step, torch_npu's own version of Adam asks which device is current, which initialises it."""

    initialised = False

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self.initialised = "torch_npu" in sys.modules and torch.npu.is_initialized()


def train_on_the_cpu(folder: Path) -> dict[str, Any]:
    look = BeforeTheFirstStep()
    losses, trainer = fit(folder, quantize=True, dropout=0.5, callbacks=[look], accelerator="auto", devices=1)
    trainer.save_checkpoint(folder / "a.ckpt")
    keys = sorted(torch.load(folder / "a.ckpt", weights_only=True))
    return {
        "losses": losses,
        "initialised": look.initialised,
        "keys": keys,
        "record": (folder / "r.txt").read_text(),
    }


def test_training_on_the_cpu_of_a_machine_with_npus_changes_nothing(
    npu_run: Callable[..., Any], tmp_path: Path
) -> None:
    assert "torch_npu" not in sys.modules
    folders = [tmp_path / "without", tmp_path / "with"]
    for folder in folders:
        folder.mkdir()
    (result,) = npu_run(train_on_the_cpu, folders[1])
    assert result.value == train_on_the_cpu(folders[0])
    assert not result.value["initialised"]
