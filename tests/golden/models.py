"""Small plain-PyTorch models used by the golden data in this folder.

Every class builds with no arguments.  `MODELS` maps the model name used in
the metadata files to the class.  Weights are always loaded from the stored
`init/` tensors, so default initialisation does not matter.
"""

import torch
import torch.nn.functional as F
from torch import nn


class CnnBnRelu(nn.Module):
    """conv-bn-relu, conv(no bias, stride 2)-bn-relu, pool, linear."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


class ResBlock(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.relu2 = nn.ReLU()
        self.down = None
        if stride != 1 or cin != cout:
            self.down = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        r = x if self.down is None else self.down(x)
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + r)


class ResDown(nn.Module):
    """Residual CNN; in `block` conv1 and down.0 read the same tensor."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.block = ResBlock(6, 8, 2)
        self.block2 = ResBlock(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = self.block2(self.block(x))
        return self.fc(torch.flatten(self.pool(x), 1))


class DepthwiseNet(nn.Module):
    """pointwise, depthwise, grouped convolutions."""

    def __init__(self):
        super().__init__()
        self.pw1 = nn.Conv2d(4, 8, 1)
        self.relu1 = nn.ReLU()
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.gconv = nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=4)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        x = self.relu1(self.pw1(x))
        x = self.relu2(self.bn(self.dw(x)))
        x = self.gconv(x)
        return self.fc(x.mean(dim=(2, 3)))


class ConvBnNoRelu(nn.Module):
    """conv -> bn -> conv -> bn, no activation function in between."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 4 * 4, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        x = F.avg_pool2d(x, 2)
        return self.fc(torch.flatten(x, 1))


class Conv1dNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(3, 6, 5, padding=2)
        self.bn1 = nn.BatchNorm1d(6)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv1d(6, 8, 3, stride=2, groups=2, bias=False)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu2(self.conv2(x))
        return self.fc(x.mean(dim=2))


class Conv3dNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(4)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv3d(4, 6, 3, padding=1, stride=2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.conv2(x)
        return self.fc(x.mean(dim=(2, 3, 4)))


class DeconvDecoder(nn.Module):
    """linear -> two ConvTranspose2d (second one grouped) -> conv; image output."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6 * 3 * 3)
        self.relu0 = nn.ReLU()
        self.up1 = nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.up2 = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2, bias=False)
        self.relu2 = nn.ReLU()
        self.out = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, z):
        x = self.relu0(self.fc(z)).reshape(-1, 6, 3, 3)
        x = self.relu1(self.bn(self.up1(x)))
        x = self.relu2(self.up2(x))
        return self.out(x)


class MlpRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(16, 16, bias=False)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc3(self.relu2(self.fc2(self.relu1(self.fc1(x)))))


class LstmCls(nn.Module):
    """LSTM (batch_first) with explicit initial states, last step -> linear."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 6, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x, h0, c0):
        y, _ = self.rnn(x, (h0, c0))
        return self.fc(y[:, -1, :])


class GruCls(nn.Module):
    """GRU (batch_first) with explicit initial state, last step -> linear."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x, h0):
        y, _ = self.rnn(x, h0)
        return self.fc(y[:, -1, :])


class LstmNoState(nn.Module):
    """LSTM called without initial states."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 6, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.fc(y[:, -1])


class TokenMlp(nn.Module):
    """Linear layers on 3-D input (batch, token, feature)."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 8)
        self.fc1 = nn.Linear(8, 16)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.proj(x)
        x = self.norm(x + self.fc2(self.act(self.fc1(x))))
        return self.head(x.mean(dim=1))


class Unsupported(nn.Module):
    """A mix of layers; several must not be listed in the generated config."""

    def __init__(self):
        super().__init__()
        self.reflect = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.ok = nn.Conv2d(4, 4, 3, padding=1)
        self.reused = nn.Conv2d(4, 4, 3, padding=1)
        self.tie_a = nn.Conv2d(4, 4, 1)
        self.tie_b = nn.Conv2d(4, 4, 1)
        self.tie_b.weight = self.tie_a.weight
        self.up3 = nn.ConvTranspose3d(4, 4, 1)
        self.circ = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.never_called = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.reflect(x))
        x = F.relu(self.ok(x))
        x = self.reused(self.reused(x))
        x = self.tie_b(self.tie_a(x))
        x = self.up3(x.unsqueeze(2)).squeeze(2)
        x = self.circ(x)
        return self.fc(x.mean(dim=(2, 3)))


MODELS = {
    "cnn_bn_relu": CnnBnRelu,
    "res_down": ResDown,
    "depthwise": DepthwiseNet,
    "conv_bn_norelu": ConvBnNoRelu,
    "conv1d": Conv1dNet,
    "conv3d": Conv3dNet,
    "deconv": DeconvDecoder,
    "mlp": MlpRelu,
    "lstm": LstmCls,
    "gru": GruCls,
    "lstm_nostate": LstmNoState,
    "token_mlp": TokenMlp,
    "unsupported": Unsupported,
}
