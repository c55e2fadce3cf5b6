"""Networks in the shapes of those of torchvision, an eighth as wide, with random weights."""

import torch
from torch import nn

VGG16 = [8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M"]


class Vgg(nn.Module):
    """features.0 to features.30, avgpool, classifier; every ReLU in place."""

    def __init__(self, classes=5):
        super().__init__()
        layers, width = [], 3
        for item in VGG16:
            if item == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU(inplace=True)]
                width = item
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(64 * 49, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, classes)
        )

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class Basic(nn.Module):
    """Two convolutions and what came in, added in place; one ReLU that runs twice."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and before == width
        self.downsample = None if same else nn.Sequential(nn.Conv2d(before, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet34(nn.Module):
    """conv1 bn1 relu maxpool layer1-4 avgpool fc."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        width = 8
        for number, (own, count) in enumerate(zip((8, 16, 32, 64), (3, 4, 6, 3), strict=True)):
            blocks = [Basic(width if i == 0 else own, own, 2 if i == 0 and number else 1) for i in range(count)]
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
            width = own
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(64, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class MobileNet(nn.Module):
    """Five halvings in `features`, then a 1 x 1 convolution: 32 pixels end as one cell."""

    def __init__(self, classes=5):
        super().__init__()
        layers, width = [], 3
        for own in (4, 8, 8, 16, 16):
            layers.append(
                nn.Sequential(nn.Conv2d(width, own, 3, 2, 1, bias=False), nn.BatchNorm2d(own), nn.ReLU6(inplace=True))
            )
            width = own
        self.features = nn.Sequential(*layers, nn.Conv2d(width, 32, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


class ViTBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.self_attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.ln_2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    """conv_proj, a class token and a register, encoder.layers, heads; any input of whole patches."""

    def __init__(self, classes=5, width=16, patch=8):
        super().__init__()
        self.conv_proj, self.tokens = nn.Conv2d(3, width, patch, patch), nn.Parameter(torch.randn(1, 2, width))
        self.encoder = nn.Module()
        self.encoder.layers = nn.Sequential(*[ViTBlock(width) for _ in range(3)])
        self.encoder.ln, self.heads = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = self.encoder.ln(self.encoder.layers(torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)))
        return self.heads(x[:, 0])


class Quadrants(nn.Module):
    """Four feature maps of the brightness; the score of class q is the sum of quadrant q of map q (or of all maps)."""

    def __init__(self, own_map=True):
        super().__init__()
        self.stem, self.relu, self.own_map = nn.Conv2d(3, 4, 4, 4), nn.ReLU(inplace=True), own_map
        with torch.no_grad():
            self.stem.weight.fill_(0.1)
            self.stem.bias.fill_(0.1)

    def forward(self, x):
        maps = self.relu(self.stem(x))
        rows, columns = maps.shape[-2] // 2, maps.shape[-1] // 2
        places = [(slice(None, rows), slice(None, columns)), (slice(None, rows), slice(columns, None))]
        places += [(slice(rows, None), slice(None, columns)), (slice(rows, None), slice(columns, None))]
        chosen = [maps[:, q : q + 1 if self.own_map else None, down, across] for q, (down, across) in enumerate(places)]
        return torch.stack([part.sum((1, 2, 3)) for part in chosen], 1)


class Answers(nn.Module):
    """A network whose scores `wrap` packs into some output."""

    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.wrap = MobileNet(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))
