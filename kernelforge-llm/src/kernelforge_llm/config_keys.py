"""The keys of a config.json: those that are read, those that change no result, those that do and are not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelforge.errors import AssetError

COMMON_KEYS = frozenset(
    {
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "dtype",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
        "original_max_position_embeddings",
    }
)
SLIDING_KEYS = frozenset(("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"))

# Training, bookkeeping and text-generation settings: none of them changes a logit.
_HARMLESS_KEYS = frozenset(
    {
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "use_cache",
        "transformers_version",
        "pretraining_tp",
        "pad_token_id",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "chunk_size_feed_forward",
        "is_decoder",
        "name_or_path",
        "auto_map",
        "attn_implementation",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "task_specific_params",
        "tokenizer_class",
        "prefix",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "sep_token_id",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "finetuning_task",
        "is_llama_config",
        "transformers.js_config",
        "unsloth_version",
        "unsloth_fixed",
    }
)

# These change results; the values listed (and null and false) mean that they are off.
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleave": (),
    "rope_interleaved": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "use_mrope": (),
    "attention_multiplier": (),
    "attn_temperature_tuning": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
    "use_qk_norm": (),
    "qk_layernorm": (),
    "alibi": (),
    "attention_chunk_size": (),
    "sliding_window_pattern": (),
    "parallel_attn": (),
    "use_parallel_residual": (),
    "use_bias": (),
    "qkv_bias": (),
    "attention_out_bias": (),
    "lm_head_bias": (),
    "hidden_activation": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "num_experts_per_tok": (0,),
    "is_encoder_decoder": (),
    "add_cross_attention": (),
    "tie_encoder_decoder": (),
    "pruned_heads": ({},),
    "quantization_config": ({},),
    "quantization": ({},),
    "compression_config": ({},),
    "text_config": (),
    "vision_config": (),
    "audio_config": (),
}


def unknown_keys(values: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """The keys outside `known` that are neither harmless nor switched off.

    Raises `AssetError` for a key that is known to change results.
    """
    unknown = []
    for key, value in values.items():
        if key in known or key in _HARMLESS_KEYS or key.startswith("_") or value is None or value is False:
            continue
        if key not in _NEUTRAL_VALUES:
            unknown.append(key)
        elif value not in _NEUTRAL_VALUES[key] or isinstance(value, bool):
            raise AssetError(f"{key} = {shorten(value)} changes results and is not supported")
    return unknown


def shorten(value: object) -> str:
    """`repr(value)` cut to the length that a message can bear."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
