"""Bring the layers of a model into the phase that a schedule wants of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.optim import Optimizer

from amct_lightning.callbacks.schedule.checks import check_contradictions, check_patterns
from amct_lightning.callbacks.schedule.holding import FrozenNorm, Holder
from amct_lightning.callbacks.schedule.schedule import LayerPhase, Phase, Position, QuantSchedule
from amct_lightning.conversion.plan import find_plan
from amct_lightning.modules import QATLayer
from amct_lightning.modules.folding import current_weight
from amct_lightning.modules.skipped import SkippedLayers
from amct_lightning.quantizers import ActivationQuantizer, LearnedWeightQuantizer, WeightQuantizer

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class PhaseRunner:
    """Applies a schedule to a converted model during one training.

    Args:
        schedule: The schedule.
        model: The converted module.
        at: Where the training begins. What is frozen there is kept as it is, before the first batch, too.

    Attributes:
        layers: The quantized layers by name.
        phases: What the schedule wants of each of them at present.
        observing: The activation quantizers that may calibrate by now.

    Raises:
        ValueError: If the schedule contradicts itself or names layers that there are not.
    """

    def __init__(self, schedule: QuantSchedule, model: nn.Module, at: Position) -> None:
        found = find_plan(model)
        root, layers = (model, ()) if found is None else (found[0], found[1].layers)
        self.layers = {layer.name: cast(QATLayer, root.get_submodule(layer.name)) for layer in layers}
        self.owners = {layer.name: layer.shares_input_of for layer in layers}
        norms = {name: module for name, module in root.named_modules() if isinstance(module, BATCH_NORMS)}
        folded = {layer.batch_norm: layer.name for layer in layers if layer.batch_norm is not None}
        check_contradictions(schedule, at.max_epochs)
        check_patterns(schedule, [*self.layers, *norms])
        self.schedule = schedule = schedule.with_names({*self.layers, *norms})
        self.batch_norms = [
            (name if schedule.pattern_of(name) is not None else folded.get(name, name), module)
            for name, module in norms.items()
        ]
        self.phases: dict[str, LayerPhase] = {}
        self.observing: frozenset[ActivationQuantizer] = frozenset()
        self._quantizers = [quantizer for layer in self.layers.values() for quantizer in data_quantizers(layer)]
        self._seen: list[object] | None = None
        self._phase, self._text = Phase.FLOAT, ""
        self._frozen_norms: dict[nn.Module, FrozenNorm] = {}
        self._has_updates = False  # whether factors are held between the steps at which they are updated
        self._waiting: list[ActivationQuantizer] = []  # to be frozen as soon as they are calibrated
        self._skipped = SkippedLayers(self.layers.values())
        self._holder = Holder()
        self._at: Position | None = None
        self._apply_norms(at, [])

    def forget(self) -> None:
        """Look at all layers again with the next batch: other values were loaded into the model."""
        self._holder.hold([])
        self._at = None

    def start_batch(self, at: Position) -> bool:
        """Bring the layers into their phases.

        Args:
            at: The position of the coming batch.

        Returns:
            Whether layers have begun to calibrate anew.
        """
        self.restore()
        for kept in self._frozen_norms.values():
            kept.hold(new_epoch=at.batch == 0)
        if self._at is not None and not self._may_change(self._at, at):
            return False
        self._at, self._seen = at, None
        self._waiting = []
        self.phases = {name: self.schedule.phase(name, at) for name in self.layers}
        self._has_updates = any(phase.held_between_updates for phase in self.phases.values())
        calibrate = [name for name in self.layers if self.phases[self.owners[name]].calibrates]
        self.observing = frozenset(quantizer for name in calibrate for quantizer in data_quantizers(self.layers[name]))
        held: list[nn.Module] = []
        anew = False
        for name, layer in self.layers.items():
            anew |= self._apply_data(name, layer, held)
            self._apply_weights(self.phases[name], layer, held)
        self._apply_norms(at, held)
        self._holder.hold(held)
        return anew

    def before_step(self, optimizer: Optimizer) -> None:
        """Drop gradients of factors that are not to change, and freeze ranges that were to be calibrated before.

        Args:
            optimizer: The optimizer that is about to step.
        """
        self._skipped.catch_up()
        for quantizer in [quantizer for quantizer in self._waiting if not quantizer.calibrating]:
            quantizer.freeze()
            self._holder.hold([quantizer], also=True)
        self._holder.drop_gradients(optimizer)

    def after_backward(self, manual: bool) -> None:
        """Expect that frozen factors are written from now on.

        Args:
            manual: Whether the loop may do so without a call of :meth:`before_step`.
        """
        self._holder.after_backward(zero=manual)

    def restore(self) -> None:
        """Put frozen factors back, whatever has written them."""
        self._holder.restore()

    def end_batch(self, step: int) -> None:
        """Let the weight scales that follow the weight at updates only follow it now, if an update was made.

        Args:
            step: Number of optimizer steps done now.
        """
        self._holder.end_batch()
        if self._at is None or step == self._at.step or not self._has_updates:
            return
        for name, phase in self.phases.items():
            if phase.held_between_updates and phase.updates and not phase.weights_frozen:
                for quantizer, weight in weight_quantizers(self.layers[name]):
                    if not isinstance(quantizer, LearnedWeightQuantizer):
                        quantizer.refresh(weight())

    def end(self) -> None:
        """Let go of the optimizers and give the batch normalizations back their training mode."""
        self._holder.close()
        self._thaw_norms(())

    def frozen_modules(self) -> set[nn.Module]:
        """Return the quantizers and batch normalizations that are frozen for good by now."""
        frozen = set(self._frozen_norms)
        for name, phase in self.phases.items():
            layer = self.layers[name]
            if self.phases[self.owners[name]].data_frozen:
                frozen.update(quantizer for quantizer in data_quantizers(layer) if quantizer.frozen)
            if phase.weights_frozen and layer.quant_mode == "quantized":
                frozen.update(quantizer for quantizer, _ in weight_quantizers(layer))
        return frozen

    @property
    def phase(self) -> Phase:
        """The phase of the least advanced layer."""
        return self.look()[0]

    def look(self) -> tuple[Phase, str]:
        """Return the phase, also in words, for people; as every batch asks for it, it is found out if it may differ."""
        seen: list[object] = [layer.quant_mode for layer in self.layers.values()]
        seen += [quantizer.calibrating and not quantizer.missed for quantizer in self._quantizers]
        if seen != self._seen:
            self._seen = seen
            self._phase = min((self._phase_of(name) for name in self.layers), default=Phase.FLOAT)
            self._text = self._in_words(self._phase)
        return self._phase, self._text

    def _in_words(self, phase: Phase) -> str:
        frozen = []
        if phase is Phase.LEARNING:  # of layers that are not quantized yet nothing else can be said
            frozen += [word for word, part in (("ranges", "data"), ("weights", "weights")) if self._all(part)]
        if self._frozen_norms:
            count, total = len(self._frozen_norms), len(self.batch_norms)
            frozen.append("bn" if count == total else f"{count} of {total} bn")
        return phase.name.lower() + (f", {' and '.join(frozen)} frozen" if frozen else "")

    def _all(self, part: str) -> bool:
        return all(getattr(phase, f"{part}_frozen") for phase in self.phases.values())

    def _phase_of(self, name: str) -> Phase:
        layer, phase = self.layers[name], self.phases.get(name)
        calibrating = any(q.calibrating and not q.missed for q in data_quantizers(layer))
        if calibrating and layer.quant_mode != "float":
            return Phase.CALIBRATING
        if layer.quant_mode != "quantized":
            return Phase.FLOAT
        frozen = phase is not None and phase.weights_frozen and self.phases[self.owners[name]].data_frozen
        return Phase.FROZEN if frozen else Phase.LEARNING

    def _may_change(self, before: Position, at: Position) -> bool:
        """Tell whether phases can differ between two batches, so that most of them cost nothing."""
        if at.max_epochs is not None and at.epoch >= at.max_epochs:
            return False  # the pass that StochasticWeightAveraging adds for the batch normalizations trains nothing
        if at.epoch != before.epoch or self._waiting or type(self.schedule) is not QuantSchedule:
            return True
        return at.step != before.step and self._has_updates

    def _apply_data(self, name: str, layer: QATLayer, held: list[nn.Module]) -> bool:
        """Set the mode of a layer, and of its quantizers if it owns them; return whether they calibrate anew."""
        phase = self.phases[self.owners[name]]
        quantizers = data_quantizers(layer)
        calibrated = all(quantizer.has_range for quantizer in quantizers)
        if phase.quantized and (calibrated or phase.calibrates):
            layer.quant_mode = "quantized"
        else:
            layer.quant_mode = "observe" if phase.calibrates else "float"
        anew = False
        for quantizer in quantizers if self.owners[name] == name else quantizers[1:]:
            if phase.recalibrates and not (phase.data_frozen and quantizer.frozen):
                quantizer.recalibrate()
                anew |= quantizer.recalibrating
            keep = phase.data_frozen or not phase.updates or layer.quant_mode != "quantized"
            quantizer.freeze(keep and not quantizer.calibrating)
            if quantizer.frozen:
                held.append(quantizer)
            elif keep:
                self._waiting.append(quantizer)
        return anew

    def _apply_weights(self, phase: LayerPhase, layer: QATLayer, held: list[nn.Module]) -> None:
        for quantizer, weight in weight_quantizers(layer):
            if layer.quant_mode != "quantized":
                held.append(quantizer)
            elif isinstance(quantizer, LearnedWeightQuantizer):
                if phase.weights_frozen or not phase.updates:
                    if quantizer.starting:
                        quantizer.freeze(weight())
                    held.append(quantizer)
            elif phase.weights_frozen or phase.held_between_updates or not phase.updates:
                if not quantizer.frozen:
                    quantizer.freeze(weight())
            else:
                quantizer.unfreeze()

    def _apply_norms(self, at: Position, held: list[nn.Module]) -> None:
        frozen = [norm for name, norm in self.batch_norms if self.schedule.should_freeze("bn", name, at)]
        self._thaw_norms(frozen)
        for norm in frozen:
            if norm not in self._frozen_norms:
                self._frozen_norms[norm] = FrozenNorm(norm)
            self._frozen_norms[norm].hold()
            held.append(norm)

    def _thaw_norms(self, still_frozen: Collection[nn.Module]) -> None:
        for norm in [norm for norm in self._frozen_norms if norm not in still_frozen]:
            self._frozen_norms.pop(norm).release()


def data_quantizers(layer: QATLayer) -> list[ActivationQuantizer]:
    """Return the activation quantizers of a layer, that of its input first."""
    return [layer.get_quantizer(name) for name in layer.activation_quantizers]


def weight_quantizers(layer: QATLayer) -> Iterator[tuple[WeightQuantizer, Callable[[], Tensor]]]:
    """Yield the weight quantizers of a layer, each with a function that gets the weight it quantizes.

    Getting a sharded weight is a collective, so it is left to those who need it.
    """
    for name, parameter in layer.weight_quantizers.items():
        yield getattr(layer, name), partial(current_weight, layer, parameter)
