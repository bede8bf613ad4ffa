"""What the two small models are: vocabulary, tokenizer, chat template, configuration, and how they are saved."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Tokens 0 to 255 are the bytes.
PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END = range(256, 263)
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# A multiple of 8; the last row is used by no token.
VOCABULARY = 264
SHORT_CONTEXT = 1024
CONTEXT = 4096
LONG_CONTEXT = 8192

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=LONG_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _byte_symbols() -> dict[str, int]:
    """The printable character by which the byte-level pre-tokenizer of the tokenizers library stands for each byte.

    Bytes that print stand for themselves; the others take the characters from 256 upwards, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    symbols = {chr(byte): byte for byte in printable}
    symbols.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return symbols


def tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8; nothing is added in front or behind."""
    backend = Tokenizer(models.BPE(vocab=_byte_symbols(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        padding_side="left",
        model_max_length=LONG_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save(model: LlamaForCausalLM, directory: Path, *, chat: bool) -> None:
    """Write model (bf16) and tokenizer to ``directory``; files of other names there stay. The model is unchanged."""
    packed = LlamaForCausalLM(configuration()).to(torch.bfloat16)
    packed.load_state_dict(model.state_dict())
    packed.tie_weights()
    packed.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=[END, EOS] if chat else EOS, do_sample=False
    )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as beside:
        packed.save_pretrained(beside)
        tokenizer(chat=chat).save_pretrained(beside)
        for path in Path(beside).iterdir():
            os.replace(path, directory / path.name)


def load(directory: Path) -> LlamaForCausalLM:
    """The saved model in fp32, for further training."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
