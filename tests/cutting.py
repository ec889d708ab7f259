"""Models that are cut by hand as compaction cuts them: fewer channels, hidden units and heads."""

import torch
from torch import nn


class Residual(nn.Module):
    """A small network of convolutions, with all of ResNet's parts; ``inner`` is what can be cut."""

    def __init__(self, inner=6, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.inner = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.outer = nn.Conv2d(inner, width, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(4 * width, 5)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.outer(self.depthwise(self.bn(self.inner(x)).relu()))).relu()
        return self.head(self.pool(x).flatten(1))


def encoder(feedforward=24):
    layer = nn.TransformerEncoderLayer(16, 2, feedforward, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=20, **sizes), add_pooling_layer=False)


def keep_rows(layer, rows):
    """Keep these outputs of a Linear."""
    layer.weight, layer.bias = nn.Parameter(layer.weight[rows].detach()), nn.Parameter(layer.bias[rows].detach())
    layer.out_features = len(rows)


def keep_columns(layer, columns):
    """Keep these inputs of a Linear."""
    layer.weight, layer.in_features = nn.Parameter(layer.weight[:, columns].detach()), len(columns)


def bert_cut():
    """Return a BERT with 3 of 4 heads in its first layer, 1 in its second, and fewer hidden units."""
    model = bert()
    for layer, heads, units in zip(model.encoder.layer, ([0, 2, 3], [1]), (7, 24), strict=True):
        attention = layer.attention.self
        columns = torch.cat([torch.arange(4 * head, 4 * head + 4) for head in heads])
        for each in (attention.query, attention.key, attention.value):
            keep_rows(each, columns)
        keep_columns(layer.attention.output.dense, columns)
        attention.num_attention_heads, attention.all_head_size = len(heads), len(columns)
        keep_rows(layer.intermediate.dense, torch.arange(units))
        keep_columns(layer.output.dense, torch.arange(units))
    return model


MODELS = {  # constructor of the dense model, one that is cut, its inputs
    "convolutions": (Residual, lambda: Residual(inner=3), lambda n: (torch.randn(n, 3, 8, 8),)),
    "encoder": (encoder, lambda: encoder(11), lambda n: (torch.randn(n, 5, 16),)),
    "bert": (bert, bert_cut, lambda n: (torch.randint(50, (n, 5)), torch.ones(n, 5, dtype=torch.long))),
}


def alive(model):
    """Give the statistics and scales of BatchNorms values that tell channels apart, and return the model in eval."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)
    return model.eval()
