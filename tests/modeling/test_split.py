"""A model cut anywhere computes what the whole model computes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from stagewright.modeling import split  # noqa: E402
from stagewright.planner.errors import InvalidArgument  # noqa: E402


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden):
        return hidden + self.dropout(torch.relu(self.inner(self.norm(hidden))))


class TinyGPT(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.token = nn.Embedding(50, 16)
        self.position = nn.Embedding(8, 16)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([Block(16) for _ in range(4)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens, targets):
        hidden = self.dropout(self.token(tokens) + self.position(torch.arange(tokens.shape[1])))
        for block in self.blocks:
            hidden = block(hidden)
        return functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())


class SkippingGPT(TinyGPT):
    """Each block also sees the embedding: a value that skips layers inside the forward."""

    def forward(self, tokens, targets):
        hidden = first = self.token(tokens)
        for block in self.blocks:
            hidden = block(hidden + first)
        return functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())


class WideBlock(Block):
    """A block of another class."""


class Rearranged(nn.Module):
    """Head and last norm are registered first, as OPT and XLM-RoBERTa do, and blocks are of two classes, as in Jamba."""

    _no_split_modules = ("Block", "WideBlock")

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(16, 50, bias=False)
        self.token = nn.Embedding(50, 16)
        self.final_layer_norm = nn.LayerNorm(16)
        self.blocks = nn.ModuleList([Block(16), WideBlock(16), Block(16)])
        self.layernorm_embedding = nn.LayerNorm(16)

    def forward(self, tokens, targets):
        hidden = self.layernorm_embedding(self.token(tokens))
        for block in self.blocks:
            hidden = block(hidden)
        return functional.cross_entropy(self.lm_head(self.final_layer_norm(hidden)).flatten(0, 1), targets.flatten())


class Residual(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, image):
        return torch.relu(self.convolution(image))


class TinyResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Residual(4, 1), Residual(4, 1))
        self.layer2 = nn.Sequential(Residual(4, 2), Residual(4, 1), Residual(4, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, image):
        image = self.layer2(self.layer1(self.relu(self.stem(image))))
        return self.fc(torch.flatten(self.pool(image), 1))


class Branches(nn.Module):
    """Two branches and a join, listed explicitly."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)
        self.join = nn.Bilinear(6, 6, 3)

    def stagewright_layers(self):
        return {"left": self.left, "right": self.right, "join": self.join}

    def stagewright_edges(self):
        return [("left", "join"), ("right", "join")]


def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(1))


def plain_models():
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return {
        "tied": (TinyGPT(), (tokens(), tokens())),
        "untied": (TinyGPT(tied=False), (tokens(), tokens())),
        "rearranged": (Rearranged(), (tokens(), tokens())),
        "convolutions": (TinyResNet(), (images, torch.tensor([0, 2]))),
        "sequential": (
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
            (torch.ones(5, 4), torch.tensor([0, 1, 2, 0, 1])),
        ),
    }


def hugging_face_models():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    text = {"input_ids": tokens(), "labels": tokens()}
    images = {"pixel_values": torch.ones(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    vit = dict(sizes, image_size=16, patch_size=8)
    del vit["vocab_size"]
    return {
        "llama": (transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1)), text),
        "gpt2": (
            transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16)
            ),
            text,
        ),
        "mixtral": (
            transformers.MixtralForCausalLM(
                transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4)
            ),
            text,
        ),
        "bert": (transformers.BertForMaskedLM(transformers.BertConfig(**sizes)), text),
        "vit": (transformers.ViTForImageClassification(transformers.ViTConfig(**vit)), images),
    }


def assert_every_cut_agrees(model, batch) -> None:
    chain = split(model)
    count = chain.num_layers
    (whole,) = chain.segment(0, count).run(batch, seed=3)
    whole.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    for cut in range(1, count):
        model.zero_grad()
        sent = chain.segment(0, cut).run(batch, seed=3)
        received = [value.detach().requires_grad_() for value in sent]
        (loss,) = chain.segment(cut, count).run(batch, *received, seed=3)
        assert torch.equal(loss, whole)
        loss.backward()
        torch.autograd.backward(sent, [value.grad for value in received])
        for name, value in model.named_parameters():
            if name in expected:
                assert torch.allclose(value.grad, expected[name], rtol=1e-4, atol=1e-6), (cut, name)
    values = chain.segment(0, 1).run(batch, seed=3)
    for index in range(1, count):
        values = chain.segment(index, index + 1).run(batch, *values, seed=3)
    assert torch.equal(values[0], whole)


@pytest.mark.parametrize("name", ["tied", "untied", "rearranged", "convolutions", "sequential"])
def test_a_plain_model_cut_anywhere_gives_the_same_loss_and_gradients(name):
    torch.manual_seed(0)
    assert_every_cut_agrees(*plain_models()[name])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "vit"])
def test_a_hugging_face_model_cut_anywhere_gives_the_same_loss_and_gradients(name):
    torch.manual_seed(0)
    assert_every_cut_agrees(*hugging_face_models()[name])


def test_layers_of_a_gpt_have_names_kinds_classes_and_ties():
    chain = split(TinyGPT())
    assert chain.layer_names == ("embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm", "head", "loss")
    assert [layer.kind for layer in chain.layers] == ["embedding", *["block"] * 4, "norm", "head", "loss"]
    assert len({layer.layer_class for layer in chain.layers[1:5]}) == 1
    assert [layer.num_parameters for layer in chain.layers] == [928, 304, 304, 304, 304, 32, 800, 0]
    (tie,) = chain.ties
    assert (tie.parameter, tie.layers, tie.num_parameters) == ("token.weight", ("embedding", "head"), 800)


def test_well_known_names_stand_where_they_are_used():
    names = split(Rearranged()).layer_names
    assert names == ("embedding", "blocks.0", "blocks.1", "blocks.2", "final_layer_norm", "lm_head", "loss")


def test_stages_of_residual_nets_are_cut_inside_each_sequence_of_blocks():
    assert split(TinyResNet()).layer_names == (
        "stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2", "fc", "loss",
    )  # fmt: skip


def test_a_graph_of_layers_joins_two_inputs():
    model, batch = Branches(), (torch.ones(2, 4), torch.tensor([0, 1]))
    chain = split(model)
    left, right = chain.segment_of((0,)), chain.segment_of((1,))
    join = chain.segment_of((2,))
    assert join.sources == (0, 1)
    (loss,) = join(batch, {**left(batch), **right(batch)})[2]
    expected = functional.cross_entropy(model.join(model.left(batch[0]), model.right(batch[0])), batch[1])
    assert torch.equal(loss, expected)


class Recurrent(nn.Module):
    """Layers that return a tuple: the output and a state that is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(50, 16)
        self.rnns = nn.ModuleList([nn.LSTM(16, 16, batch_first=True) for _ in range(3)])
        self.head = nn.Linear(16, 50)

    def forward(self, tokens, targets):
        hidden = self.token(tokens)
        for rnn in self.rnns:
            hidden, _ = rnn(hidden)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


def test_layers_that_return_more_than_a_tensor_are_passed_over():
    torch.manual_seed(0)
    assert_every_cut_agrees(Recurrent(), (tokens(), tokens()))


@pytest.mark.parametrize("name", ["t5", "bart", "swin"])
def test_encoder_decoder_and_hierarchical_models_cut_anywhere_agree(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {"input_ids": tokens(), "labels": tokens()}
    if name == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
        config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
        return assert_every_cut_agrees(transformers.T5ForConditionalGeneration(config), text)
    if name == "bart":
        halves = {f"{half}_{size}": 2 for half in ("encoder", "decoder") for size in ("layers", "attention_heads")}
        config = transformers.BartConfig(
            d_model=16, vocab_size=50, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0, **halves
        )
        return assert_every_cut_agrees(transformers.BartForConditionalGeneration(config), text)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.0
    )
    images = {"pixel_values": torch.ones(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    return assert_every_cut_agrees(transformers.SwinForImageClassification(config), images)


class Biased(nn.Module):
    """A bias of positions is given to every block, and the head takes what the pooler before it took."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList([nn.Bilinear(16, 16, 16) for _ in range(3)])
        self.relative_attention_bias = nn.Embedding(8, 16)
        self.pooler = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, tokens, targets):
        hidden = self.token(tokens)
        bias = self.relative_attention_bias(torch.arange(tokens.shape[1]).expand_as(tokens))
        for block in self.blocks:
            hidden = block(hidden, bias)
        self.pooler(hidden)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


class Rows(nn.Module):
    """One loop walks three lists, with residuals between their modules; one list holds lists."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(50, 16)
        self.mixers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.deep = nn.ModuleList([nn.ModuleList([nn.Linear(16, 16) for _ in range(2)]) for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(3)])
        self.head = nn.Linear(16, 50)

    def forward(self, tokens, targets):
        hidden = self.token(tokens)
        for index, norm in enumerate(self.norms):
            hidden = hidden + torch.tanh(self.mixers[index](hidden))
            hidden = norm(hidden)
            for part in self.deep[index]:
                hidden = hidden + torch.relu(part(hidden))
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("model", [Biased, Rows])
def test_what_a_layer_was_given_may_be_used_again_after_it(model):
    torch.manual_seed(0)
    assert_every_cut_agrees(model(), (tokens(), tokens()))


def test_lists_that_one_loop_walks_are_layers_of_one_module_of_each():
    chain = split(Rows())
    assert chain.layer_names == ("token", "mixers.0", "mixers.1", "mixers.2", "head", "loss")
    assert chain.layers[1].modules == ("mixers.0", "norms.0", "deep.0.0", "deep.0.1")
    assert len({layer.layer_class for layer in chain.layers[1:4]}) == 1
    assert sum(layer.num_parameters for layer in chain.layers) == sum(value.numel() for value in Rows().parameters())


def test_a_row_whose_second_module_is_called_first_is_refused():
    class Late(Rows):
        def forward(self, tokens, targets):
            hidden = self.token(tokens)
            for index in range(3):
                hidden = self.norms[index](hidden)
            for index, norm in enumerate(self.norms):
                hidden = norm(self.mixers[index](hidden)) + self.deep[index][0](hidden)
            return functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())

    with pytest.raises(InvalidArgument, match="calls layer"):
        split(Late()).segment(0, 6).run((tokens(), tokens()))


def test_layers_that_are_dropped_at_random_always_run(caplog):
    class Dropping(TinyGPT):
        def __init__(self):
            super().__init__()
            self.layerdrop = 0.999

        def forward(self, tokens, targets):
            hidden = self.token(tokens)
            for block in self.blocks:
                hidden = hidden if torch.rand(()) < self.layerdrop else block(hidden)
            return functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    assert_every_cut_agrees(Dropping(), (tokens(), tokens()))
    assert "layerdrop 0.999 is taken as 0" in caplog.text


def test_modules_whose_text_needs_values_are_cut_on_the_meta_device():
    class Scaled(nn.Linear):
        def __repr__(self):
            return f"Scaled({self.weight.sum().item()})"

    with torch.device("meta"):
        chain = split(nn.Sequential(Scaled(4, 4), Scaled(4, 4), Scaled(4, 3)))
    assert [layer.layer_class for layer in chain.layers[:3]] == ["Scaled", "Scaled", "Scaled-2"]


class Routed(TinyGPT):
    """More experts than blocks."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])
            block.inner = nn.Sequential(block.inner, block.experts[1])


def test_the_repeated_layers_are_blocks_though_there_are_more_experts():
    assert split(Routed()).layer_names[1:5] == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")


def test_the_list_that_a_configuration_declares_holds_the_layers():
    class Declared(nn.Module):
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"base_model_pp_plan": {"embed": ([], []), "layers": ([], [])}})()
            self.model = nn.Module()
            self.model.embed = nn.Embedding(50, 16)
            self.model.others = nn.ModuleList([nn.Linear(16, 16) for _ in range(9)])
            self.model.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    kinds = [layer.name for layer in split(Declared()).layers if layer.name.startswith("model.layers")]
    assert kinds == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert "model.others.0" not in split(Declared()).layer_names


def test_a_value_that_skips_layers_is_refused_and_never_wrong():
    torch.manual_seed(0)
    chain, batch = split(SkippingGPT()), (tokens(), tokens())
    sent = chain.segment(0, 2).run(batch)
    with pytest.raises(InvalidArgument, match=r"blocks\.2.*another stage"):
        chain.segment(2, chain.num_layers).run(batch, *sent)


def test_layers_called_in_another_order_than_registered_are_refused():
    class Reversed(TinyGPT):
        def forward(self, tokens, targets):
            hidden = self.token(tokens)
            for block in reversed(self.blocks):
                hidden = block(hidden)
            return functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())

    with pytest.raises(InvalidArgument, match=r"calls layer 'blocks\.3' where 'blocks\.0' was expected"):
        split(Reversed()).segment(0, 8).run((tokens(), tokens()))


def test_placeholders_take_no_gradients_and_no_buffers():
    torch.manual_seed(0)
    chain, batch = split(TinyGPT()), (tokens(), tokens())
    received = torch.randn(2, 8, 16, requires_grad=True)
    (loss,) = chain.segment(3, chain.num_layers).run(batch, received)
    loss.backward()
    assert chain.model.blocks[0].inner.weight.grad is None
    assert chain.model.blocks[2].inner.weight.grad is not None
    assert received.grad is not None


def test_a_pattern_says_which_modules_are_the_layers():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.short = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
            self.long = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

    assert split(Two(), pattern="short.*").layer_names[:2] == ("short.0", "short.1")
    with pytest.raises(InvalidArgument, match=r"write one of long.\*, short.\*|names no list"):
        split(Two(), pattern="middle.*")
