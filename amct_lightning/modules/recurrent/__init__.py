"""The QAT twins of LSTM and GRU, and the autograd functions that make their training cheap."""

from amct_lightning.modules.recurrent.layers import QATGRU, QATLSTM

__all__ = ["QATGRU", "QATLSTM"]
