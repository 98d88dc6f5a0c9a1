"""Text to token ids and back: single bytes, GPT-2's BPE by `tiktoken`, or a Hugging Face tokenizer.json."""
import codecs
import json
import os
import re

import numpy as np

from configurator import ConfigError, did_you_mean

EOT = "<|endoftext|>"


def brief(error):
    """What a library raised, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# A tokenizer gets this many characters at once, because regular expressions overflow on a million blanks, and
# the time for one long word may grow with its square. No token crosses from a visible character into a blank,
# so a text cut there has the tokens that it has whole; one without such a place is cut anywhere.
PARTS = re.compile(r"(?s).{1,20000}(?:\Z|(?<=\S)(?= ))|.{1,20000}")


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, name, token_bytes, eot_token, encode_part, cut=PARTS.findall, file=None):
        """token_bytes: {id: bytes}; encode_part: text -> an array of ids; cut: text -> the parts that it is
        encoded in; file: the tokenizer.json behind it, if there is one."""
        self.name, self.token_bytes, self.eot_token, self.file = name, token_bytes, eot_token, file
        self.encode_part, self.cut = encode_part, cut
        self.n_vocab = max(token_bytes) + 1
        self.eot_text = token_bytes[eot_token].decode()

    def encode(self, text):
        """The ids of a document, an array. What looks like a special token in it is ordinary text."""
        return np.concatenate([self.encode_part(part) for part in self.cut(text) or [""]])

    def encode_prompt(self, text):
        """A list of ids. End-of-text, as this tokenizer writes it, is that token."""
        first, *others = [self.encode(part).tolist() for part in text.split(self.eot_text)]
        return first + [token for part in others for token in [self.eot_token, *part]]

    def decode_bytes(self, token):
        return self.token_bytes.get(token, b"")  # some vocabularies have gaps

    def decode(self, ids):
        return "".join(decode_pieces(self, ids))

    def decoder(self):
        """-> a function: a token's id -> its text, to be called for one token after the other, with last=True
        for the last. A character of several tokens comes with the last of them, and what never becomes a
        character is the replacement mark."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token, last=False: utf8.decode(self.decode_bytes(token), last)


def decode_pieces(tokenizer, ids):
    """A list of ids -> a list of texts, one for each."""
    piece = tokenizer.decoder()
    return [piece(token, i == len(ids) - 1) for i, token in enumerate(ids)]


def tokenizer(name, folder=None, eot_token=None):
    """bytes, gpt2, hf:FOLDER or hf:NAME on the hub -> a Tokenizer. Where `folder` is given, an hf one is read
    from the tokenizer.json there."""
    if name == "bytes":
        token_bytes = {i: bytes([i]) for i in range(256)} | {256: EOT.encode()}
        return Tokenizer(name, token_bytes, 256, lambda text: np.frombuffer(text.encode(), np.uint8))
    if name == "gpt2":
        return gpt2_tokenizer()
    if name.startswith("hf:"):
        return hf_tokenizer(name, folder or hf_folder(name), eot_token)
    raise ConfigError(f"tokenizer {name!r} is unknown; {did_you_mean(name, ['bytes', 'gpt2', 'hf:FOLDER'])}")


def load_tokenizer(meta, folder):
    """The tokenizer of a data folder, or of another that has its meta and a copy of its tokenizer.json."""
    return tokenizer(meta["tokenizer"], folder, meta["eot_token"])


def gpt2_tokenizer():
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' or urllib's, whichever tiktoken uses
        raise ConfigError(f"tiktoken cannot fetch the gpt2 vocabulary ({type(error).__name__}); go online "
                          "once, or point TIKTOKEN_CACHE_DIR at a folder that has it") from None
    token_bytes = {i: bpe.decode_single_token_bytes(i) for i in range(bpe.n_vocab)}
    return Tokenizer("gpt2", token_bytes, bpe.eot_token,
                     lambda text: bpe.encode_to_numpy(text, disallowed_special=()))


def hf_folder(name):
    """hf:FOLDER or hf:NAME -> the folder, fetched from the hub where there is none of that name."""
    place = name.removeprefix("hf:")
    if os.path.isdir(place):
        return place
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(place, allow_patterns=["tokenizer.json", "tokenizer_config.json"])
    except Exception as error:
        raise ConfigError(f"--tokenizer={name}: no such folder, nor can it be had from the hub "
                          f"({brief(error)}); name a folder with a tokenizer.json, or go online") from None


def hf_tokenizer(name, folder, eot_token):
    """A tokenizer.json, by Hugging Face `tokenizers`. No bos, eos or template is added."""
    import tokenizers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # encode_stream has threads of its own
    path = os.path.join(folder, "tokenizer.json")
    try:
        bpe = tokenizers.Tokenizer.from_file(path)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read ({brief(error)}); name another tokenizer") from None
    bpe.no_truncation()
    bpe.no_padding()
    bpe.encode_special_tokens = True  # as ordinary text
    if eot_token is None:
        eot_token = hf_eot_token(name, folder, bpe.get_vocab())
    byte_level, cut = "ByteLevel" in str(json.loads(bpe.to_str())["decoder"]), PARTS.findall
    if not byte_level:  # it marks where a text begins, and may know end-of-text as a word: cut there alone
        eot = bpe.id_to_token(eot_token)
        cut = re.compile(f"(?<={re.escape(eot[0])})(?={re.escape(eot[1:])})").split

    def encode_part(text):  # bpe.encode() would stop all other threads
        return np.array(bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint32)

    return Tokenizer(name, hf_token_bytes(bpe, byte_level), eot_token, encode_part, cut, path)


def hf_eot_token(name, folder, vocabulary):
    """The id of the token that ends a document."""
    eos, path = None, os.path.join(folder, "tokenizer_config.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            eos = json.load(f).get("eos_token")
    for text in (EOT, eos["content"] if isinstance(eos, dict) else eos, "</s>"):
        if text in vocabulary:
            return vocabulary[text]
    raise ConfigError(f"{name} has no end-of-text token: neither {EOT}, nor the eos_token of a "
                      "tokenizer_config.json, nor </s>; choose another tokenizer")


def hf_token_bytes(bpe, byte_level):
    """{id: bytes} of a vocabulary. A byte-level one, as GPT-2's, writes each byte as a visible character."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = dict(zip(map(chr, [*visible, *range(256, 324)]), visible + hidden))
    added, token_bytes = bpe.get_added_tokens_decoder(), {}
    for text, token in bpe.get_vocab().items():
        if token in added:
            token_bytes[token] = text.encode()
        elif byte_level:
            token_bytes[token] = bytes(byte_of[character] for character in text)
        elif re.fullmatch("<0x[0-9A-F]{2}>", text):
            token_bytes[token] = bytes.fromhex(text[3:5])
        else:  # what it adds to a text: where a text begins, a token may lose its blank
            alone, twice = bpe.decode([token], False), bpe.decode([token, token], False)
            token_bytes[token] = twice[len(alone):].encode()
    return token_bytes
