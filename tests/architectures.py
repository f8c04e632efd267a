"""Tiny random models of many architectures, with tokenizers in the style of the real ones."""

import json
import math
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertTokenizer,
    CohereTokenizer,
    DebertaV2Tokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
    RemBertTokenizer,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)
from transformers import PreTrainedTokenizerFast as Fast

SENTENCES = [
    ["The", "cat", "sees", "a", "big", "dog", "."],
    ["can't", "(", "well-known", ")", "U.S.", ",", "e.g.", "...", "%-5", "'s", "3,5", "a_b"],
    ["naïve", "cafe\u0301", "हिन्दी", "में", "ภาษา", "ไทยนี้", "!"],
    ["xã hội", "chủ nghĩa", "là", "a  b", "."],
    ["😀", "ok", "👩\u200d👧", "!", "✈\ufe0f"],
    ["，", "你好", "，", "世界", "。", "("],
    ["a"],
    ["Ünïcödé", "ЁЖИК", "ёлка", "Ελλάδα", "«", "да", "»"],
]
TEXT = [" ".join(words) for words in SENTENCES] * 4 + ["the cat and the dog see a big old house"]
SIZE = 420  # subwords
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = ["<|user|>", "<|assistant|>"]  # tokens of chat templates


# Backends: how text becomes subwords.


def pieces(words: list[str]) -> list[str]:
    """Return the first letters of each word that occur twice, and all characters; sorted."""
    heads = Counter(word[:size] for word in words for size in range(2, 5))
    characters = {character for word in words for character in word}
    return sorted(characters) + sorted(head for head, count in heads.items() if count > 1)


def wordpiece(special: list[str]) -> Tokenizer:
    """As in BERT."""
    words = normalizers.NFC().normalize_str(" ".join(TEXT)).replace("😀", "a").split()
    known = pieces(words)  # but one emoji
    vocabulary = [*special, *known, *(f"##{piece}" for piece in known)]
    backend = Tokenizer(models.WordPiece({piece: k for k, piece in enumerate(vocabulary)}))
    return backend


def unigram(special: list[str], unknown: str, split: bool = True) -> Tokenizer:
    """As in XLM-R; split: at blanks, before `▁` is put in front of words."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.pre_tokenizer = metaspace
    if split:
        splitter = pre_tokenizers.WhitespaceSplit()
        backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, metaspace])
    backend.decoder = decoders.Metaspace()
    words = [f"▁{word}" for word in backend.normalizer.normalize_str(" ".join(TEXT)).split()]
    known = [piece for piece in pieces(words) if piece[0] != "▁" or piece[1:].isascii()]
    known.remove("😀")  # an unknown character
    scores = [(piece, 0.0) for piece in special]
    scores += [(piece, -10 + 1.5 * len(piece) - k / 1e3) for k, piece in enumerate(known)]
    backend.model = models.Unigram(scores, unk_id=special.index(unknown))
    return backend


def byte_level(special: list[str], pattern: str, prefix: bool = False, nfc=False) -> Tokenizer:
    """As in RoBERTa, ModernBERT and Llama 3; pattern: how text is split into words."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if nfc else None
    if pattern == GPT2:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def sentencepiece(special: list[str]) -> Tokenizer:
    """As in Gemma and Llama 2: blanks become `▁`, and unknown characters become bytes."""
    all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # no word is merged
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 356, special_tokens=[*special, *all_bytes], show_progress=False
    )
    known = [text for text in TEXT if text.isascii()]
    backend.train_from_iterator(known, trainer)
    return backend


# Tokenizers: the classes that real models name.


def of_class(kind: type, backend: Tokenizer, **special):
    """Return a tokenizer of a class of transformers with the vocabulary of a backend."""
    state = json.loads(backend.to_str())["model"]
    options = {"vocab": state["vocab"]}
    if type(state["vocab"]) is list:
        options["vocab"] = [tuple(piece) for piece in state["vocab"]]
    if "merges" in state:
        options["merges"] = [tuple(merge) for merge in state["merges"]]
    return kind(**options, **special)


def framed(tokenizer, single: str, pair: str):
    """Set the special tokens around a text and a pair of texts; return the tokenizer."""
    backend = tokenizer.backend_tokenizer
    names = {part.split(":")[0] for part in f"{single} {pair}".split() if part[0] != "$"}
    tokens = [(name, backend.token_to_id(name)) for name in sorted(names)]
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=tokens)
    return tokenizer


def general(backend: Tokenizer, single: str, pair: str = "", **special) -> Fast:
    """Return a tokenizer as Llama 3 and ModernBERT have it; single: special tokens of a text."""
    return framed(Fast(tokenizer_object=backend, **special), single, pair or single + " $B:1")


WITHOUT_TYPES = {"model_input_names": ["input_ids", "attention_mask"]}
BERT_ENDS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
BERT_ENDS |= {"unk_token": "[UNK]", "mask_token": "[MASK]"}
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
XLMR_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
LLAMA3_SPECIAL += ["<|end_header_id|>", "<|eot_id|>"]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bert():
    return of_class(BertTokenizer, wordpiece(BERT_SPECIAL), do_lower_case=False)


def xlmr():
    return of_class(XLMRobertaTokenizer, unigram(XLMR_SPECIAL, "<unk>"))


def xlmr_general():  # XLM-R's tokenizer in files that do not name its class
    ends = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    ends |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    backend = unigram(XLMR_SPECIAL, "<unk>")
    return general(backend, "<s> $A </s>", "<s> $A </s> </s> $B </s>", **ends)


def mdeberta():
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    return of_class(DebertaV2Tokenizer, unigram(special, "[UNK]", split=False), unk_id=3)


def rembert():
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = of_class(RemBertTokenizer, unigram(special, "<unk>", split=False))
    return framed(tokenizer, "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")


def roberta(prefix: bool = False):
    backend = byte_level(XLMR_SPECIAL, GPT2)
    return of_class(RobertaTokenizer, backend, add_prefix_space=prefix)


def roberta_with_prefix():
    return roberta(True)


def modernbert():
    special = ["|||IP_ADDRESS|||", *BERT_SPECIAL]
    backend = byte_level(special, GPT2, nfc=True)
    special = BERT_ENDS | WITHOUT_TYPES
    return general(backend, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", **special)


def mmbert():
    ends = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    ends |= {"cls_token": "<bos>", "sep_token": "<eos>", "mask_token": "<mask>"}
    backend = gemma().backend_tokenizer
    return general(backend, "<bos> $A <eos>", "<bos> $A <eos> $B <eos>", **ends, **WITHOUT_TYPES)


def gemma():
    tokenizer = of_class(GemmaTokenizer, sentencepiece(GEMMA_SPECIAL))
    return framed(tokenizer, "<bos> $A", "<bos> $A <bos> $B")


def eurobert():
    special = [*LLAMA3_SPECIAL, "<|mask|>", "<|pad|>"]
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    ends |= {"mask_token": "<|mask|>", "pad_token": "<|pad|>"}
    backend = byte_level(special, LLAMA)
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    pair = f"{begin} $A {end} $B {end}"
    return general(backend, f"{begin} $A {end}", pair, **ends, **WITHOUT_TYPES)


def llama3():
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    backend = byte_level(LLAMA3_SPECIAL, LLAMA)
    tokenizer = general(backend, "<|begin_of_text|> $A", **ends, **WITHOUT_TYPES)
    tokenizer.clean_up_tokenization_spaces = True  # as in the files of the real one
    return tokenizer


def qwen():
    backend = byte_level(QWEN_SPECIAL, LLAMA, nfc=True)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return of_class(Qwen2Tokenizer, backend, **ends)


def llama2():
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *CHAT]
    return framed(of_class(LlamaTokenizer, sentencepiece(special)), "<s> $A", "<s> $A <s> $B")


def mistral():  # the same subwords, from a file that prepends the blank
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *CHAT]
    state = json.loads(sentencepiece(special).to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    backend = Tokenizer(models.BPE(state["vocab"], merges, **options))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return general(backend, "<s> $A", **ends, **WITHOUT_TYPES)


def cohere():
    special = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>"]
    special += ["<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"]
    tokenizer = of_class(CohereTokenizer, byte_level(special, GPT2))
    return framed(tokenizer, "<BOS_TOKEN> $A", "<BOS_TOKEN> $A <BOS_TOKEN> $B")


def gpt_neox():  # OLMo 2, Granite, Falcon-H1, ModernBERT's decoder: text has no special tokens
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    backend = byte_level(["<|endoftext|>", "<|pad|>", *CHAT], LLAMA)
    return Fast(tokenizer_object=backend, **ends, **WITHOUT_TYPES)


# Models: a configuration of `transformers`, of LAYERS layers, and a tokenizer.

LAYERS, VOCABULARY = 4, 512
BASE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
BASE |= {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "max_position_embeddings": 300}
GROUPED = {"num_key_value_heads": 1, "head_dim": 16}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
DEBERTA = {  # of mDeBERTa
    "position_biased_input": False, "relative_attention": True, "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
    "max_relative_positions": -1, "type_vocab_size": 0,
}  # fmt: skip
DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 2}
MODERNBERT = {"local_attention": 6, "global_attn_every_n_layers": 2}
ENCODERS = {  # name: (model type, what its configuration adds to BASE, tokenizer)
    "BERT": ("bert", {}, bert),
    "XLM-R": ("xlm-roberta", {}, xlmr),
    "XLM-R, no class": ("xlm-roberta", {}, xlmr_general),
    "XLM-R-XL": ("xlm-roberta-xl", {}, xlmr),
    "DistilBERT": ("distilbert", DISTILBERT, bert),
    "mDeBERTa": ("deberta-v2", DEBERTA, mdeberta),
    "ModernBERT": ("modernbert", MODERNBERT, modernbert),
    "mmBERT": ("modernbert", MODERNBERT, mmbert),
    "EuroBERT": ("eurobert", GROUPED, eurobert),
    "RemBERT": ("rembert", {"input_embedding_size": 24, "output_embedding_size": 40}, rembert),
    "RoBERTa": ("roberta", {}, roberta),
    "RoBERTa, prefix": ("roberta", {}, roberta_with_prefix),
}
FALCON_H1 = GROUPED | {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_chunk_size": 8, "embedding_multiplier": 5.0, "lm_head_multiplier": 0.3,
    "key_multiplier": 0.5, "ssm_in_multiplier": 1.5, "ssm_out_multiplier": 0.7,
    "attention_out_multiplier": 0.9, "mlp_multipliers": [0.8, 1.2],
    "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2],
}  # fmt: skip
MINICPM3 = {
    "num_key_value_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "scale_emb": 3.0, "dim_model_base": 16,
}  # fmt: skip
GRANITE = GROUPED | {"logits_scaling": 3.0, "embedding_multiplier": 5.0}
GRANITE |= {"residual_multiplier": 0.5, "attention_multiplier": 0.2}
GEMMA = GROUPED | SLIDING | {"query_pre_attn_scalar": 16}
CAPPED = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
GEMMA3N = GROUPED | {
    "sliding_window": 6, "layer_types": SLIDING["layer_types"], "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4, "intermediate_size": [48] * LAYERS, "activation_sparsity_pattern": None,
}  # fmt: skip
GEMMA4 = GROUPED | SLIDING | {"hidden_size_per_layer_input": 8, "global_head_dim": 16}
GEMMA4 |= {"vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
DECODERS = {
    "Llama 2": ("llama", GROUPED, llama2),
    "Llama 3": ("llama", GROUPED, llama3),
    "Qwen 2.5": ("qwen2", {"num_key_value_heads": 1}, qwen),
    "Qwen 3": ("qwen3", GROUPED, qwen),
    "Gemma 2": ("gemma2", GEMMA | CAPPED, gemma),
    "Gemma 3": ("gemma3_text", GEMMA, gemma),
    "Mistral": ("mistral", GROUPED | {"sliding_window": 6}, mistral),
    "Phi-3": ("phi3", {"num_key_value_heads": 1, "sliding_window": 6}, mistral),
    "OLMo 2": ("olmo2", {"num_key_value_heads": 1}, gpt_neox),
    "Cohere": ("cohere", {"num_key_value_heads": 1, "logit_scale": 0.3}, cohere),
    "Cohere 2": ("cohere2", GROUPED | SLIDING | {"logit_scale": 0.3}, cohere),
    "Granite": ("granite", GRANITE, gpt_neox),
    "Falcon-H1": ("falcon_h1", FALCON_H1, gpt_neox),
    "MiniCPM3": ("minicpm3", MINICPM3, llama2),
    "SmolLM3": ("smollm3", {"num_key_value_heads": 1, "no_rope_layers": [1, 1, 1, 0]}, llama3),
    "ModernBERT decoder": ("modernbert-decoder", MODERNBERT, gpt_neox),
    "Gemma 3n text": ("gemma3n_text", GEMMA3N, gemma),
    "Gemma 4 text": ("gemma4_text", GEMMA4, gemma),
}


def configuration(model_type: str, added: dict, tokenizer):
    """Return a tiny configuration whose special tokens are those of the tokenizer."""
    options = BASE | {"pad_token_id": tokenizer.pad_token_id}
    for name in ("bos", "eos", "cls", "sep"):
        if getattr(tokenizer, f"{name}_token_id") is not None:
            options[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    return AutoConfig.for_model(model_type, **options | added)


def randomise(model: nn.Module) -> None:
    """Draw weights that are large enough for each of them to matter."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        spread = 1 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
        parameter.data += spread * torch.randn_like(parameter)


def save(name: str, folder: Path) -> Path:
    """Write a model with a head that predicts tokens, and its tokenizer, to a folder."""
    model_type, added, make_tokenizer = (ENCODERS | DECODERS)[name]
    tokenizer = make_tokenizer()
    head = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    torch.manual_seed(0)
    model = head.from_config(configuration(model_type, added, tokenizer))
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
