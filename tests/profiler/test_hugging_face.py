"""Hugging Face models of every kind: layers found, parameters counted, and the peak of a real step predicted.

The oracle is a plain training loop that knows nothing of layers, under torch's own allocator trace.
"""

import json

import pytest
import torch

from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.memory_trace import peak_above_start
from stagewright.profiler.model_profile import profile_model
from stagewright.profiler.model_source import ModelSource
from stagewright.profiler.single_device import predict_single_device

pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
CONFIGS = {
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_embd": 64, "n_head": 4,
        "vocab_size": 500, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0,
    },
    "llama": {**SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2},
    "mixtral": {
        **SMALL, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
    "bert": {**SMALL, "model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "vit": {
        **SMALL, "model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32, "patch_size": 8,
    },
    "resnet": {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "embedding_size": 8,
        "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic",
    },
    "bart": {  # without an encoder, the cross-attention of its blocks is never used
        "model_type": "bart", "architectures": ["BartForCausalLM"], "d_model": 64, "decoder_layers": 2,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 128, "vocab_size": 500, "is_decoder": True,
        "is_encoder_decoder": False, "max_position_embeddings": 64,
    },
}  # fmt: skip
BLOCKS = {
    "gpt2": ["transformer.h.{}"],
    "llama": ["model.layers.{}"],
    "mixtral": ["model.layers.{}"],
    "bert": ["bert.encoder.layer.{}"],
    "vit": ["vit.layers.{}"],
    "resnet": [f"resnet.encoder.stages.{index}" for index in range(4)],
    "bart": ["model.decoder.layers.{}"],
}
UNUSED = {"bart": 4 * (64 * 64 + 64) + 2 * 64}  # of each block: the cross-attention's projections, the norm before it
LIKE_OTHERS = ("llama", "bert")  # mixtral's layers but the experts, vit's but the embedding
CONFIGURATION = (2, 16, 1)


@pytest.fixture
def config_file(request, tmp_path):
    path = tmp_path / request.param / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIGS[request.param]))
    return path


@pytest.mark.parametrize(
    "config_file",
    [pytest.param(name, marks=pytest.mark.soak) if name in LIKE_OTHERS else name for name in CONFIGS],
    indirect=True,
)
def test_a_models_layers_and_the_peak_of_its_step_are_known(config_file):
    name = config_file.parent.name
    profile = profile_model(str(config_file), microbatches=(2,), sequence_length=16, device="cpu", budget_s=0.0)
    assert [run.name for run in profile.layers if profile.classes[run.layer_class].kind == "block"] == BLOCKS[name]
    assert [profile.classes[run.layer_class].kind for run in profile.layers][-2:] == ["head", "loss"]
    source = ModelSource(str(config_file))
    torch.manual_seed(0)
    model = source.build(device=torch.device("cpu"), dtype=torch.float32)
    assert profile.num_parameters == sum(value.numel() for value in model.parameters())
    unused = {value.unused_parameters for value in profile.classes.values() if value.kind == "block"}
    assert unused == {UNUSED.get(name, 0)}
    batch = source.batch(model, 2, 16, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step():
        for _ in range(2):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    states = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    measured = 4 * (profile.num_parameters + states) + peak_above_start(step, torch.device("cpu"))
    predicted = predict_single_device(
        profile, CONFIGURATION, num_microbatches=2, parameter_bytes=4, state_bytes=4
    ).peak_bytes
    assert predicted == pytest.approx(measured, rel=0.02)


BERT = {**SMALL, "model_type": "bert"}
TASKS = {
    "sequence": {**BERT, "architectures": ["BertForSequenceClassification"]},
    "token": {**BERT, "architectures": ["BertForTokenClassification"]},
    "question": {**BERT, "architectures": ["BertForQuestionAnswering"]},
    "speech": {
        "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "d_model": 32,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50, "num_mel_bins": 8, "max_source_positions": 16,
        "max_target_positions": 16, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
    },
    "choice": {**BERT, "architectures": ["BertForMultipleChoice"]},
    "next sentence": {**BERT, "architectures": ["BertForPreTraining"]},
    "no start token": {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_kv": 8, "d_ff": 32,
        "num_layers": 1, "num_heads": 2, "vocab_size": 50,
    },
    "no architecture": {
        "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50,
    },
    "samples": {
        **SMALL, "model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"], "vocab_size": 32, "conv_dim": [8, 8],
        "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
        "num_feat_extract_layers": 2,
    },
    "spectrogram": {
        **SMALL, "model_type": "audio-spectrogram-transformer", "architectures": ["ASTForAudioClassification"],
        "max_length": 32, "num_mel_bins": 32,
    },
    "two towers": {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 16,
        "text_config": {**SMALL, "max_position_embeddings": 16, "eos_token_id": 2},
        "vision_config": {**SMALL, "image_size": 32, "patch_size": 16},
    },
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_targets_of_a_task_are_guessed(task, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TASKS[task]))
    source = ModelSource(str(path))
    model = source.build(device=torch.device("cpu"), dtype=torch.float32)
    assert torch.isfinite(model(**source.batch(model, 2, 16, torch.device("cpu"))).loss)


def test_a_model_that_fails_on_the_guessed_batch_asks_for_a_data_factory(tmp_path):
    path = tmp_path / "config.json"
    series = {"model_type": "time_series_transformer", "architectures": ["TimeSeriesTransformerForPrediction"]}
    path.write_text(json.dumps({**series, "prediction_length": 2, "context_length": 4, "d_model": 8}))
    with pytest.raises(InvalidArgument, match=r"failed on its first batch.*past_time_features") as raised:
        profile_model(str(path), microbatches=(1,), sequence_length=16, device="cpu", budget_s=0.0)
    assert raised.value.field == "data"
