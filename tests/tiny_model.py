"""Make a tiny vision language model that llama.cpp really loads and serves.

Two GGUF files, well under 2 MB together: `tiny.gguf` (architecture `llama`, one layer) and `mmproj-tiny.gguf`
(projector type `pixtral`, one layer, so the number of image tokens follows the size of the image).

Purely random weights answer with one word repeated for ever. So the word vectors, the feed-forward network and the
whole image encoder are random, but a few directions of the hidden state are reserved for a plain mechanism:

* a word says which word classes may follow it, so that answers read like captions;
* one attention head counts the words already said, and the end-of-text token can win only once there are enough;
* two heads average the words already said and count against them, so that greedy decoding does not loop;
* one head averages the image, so that the answer depends on the image.

Nothing but the residual stream's linear read-out decides, so the mechanism holds whatever the random part does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

SEED = 7
WIDTH = 128  # of the text model's hidden state
HEADS = 4
HEAD_WIDTH = WIDTH // HEADS
FEED_FORWARD = 64
CONTEXT = 32768

# Reserved directions of the hidden state.
CONSTANT = 0  # the same for every token, so that an output row can have a bias
SAID = 1  # set for the answer's content words and for the start of the answer
ANSWER_START = 2
IMAGE = 3  # set for image tokens
FEW_SAID = 4  # written by the counting head: 1 / (1 + words said)
FILLING = 5  # makes all embeddings equally long, so that normalising leaves the flags comparable between tokens
CLASSES = 8  # first of the directions "a word of class i may come next"
LEVEL = 8.0  # usual size of a set direction
LENGTH = LEVEL * 7**0.5  # of every embedding: about six directions are set at most
# The random part: what the tokens themselves are, and (apart from it, as a word must not speak for itself) which words
# are wanted next. Only the heads and the feed-forward network lead from the first to the second.
CONTENT_WIDTH = 48
CONTENT = slice(WIDTH - 2 * CONTENT_WIDTH, WIDTH - CONTENT_WIDTH)
WANTED = slice(WIDTH - CONTENT_WIDTH, WIDTH)

VISION_WIDTH = 32
VISION_HEADS = 2
VISION_FEED_FORWARD = 64
PATCH = 32  # pixels a side; one image token each
IMAGE_SIZE = 1024

# How strongly each part speaks in the read-out (see _output_rows); found by trying on many images.
ATTENTION = 2.5  # high enough that a head sees flagged tokens only
CLASS_VOICE = 15.0
CONTENT_VOICE = 5.0
SILENCE = -20.0
REPETITION = 7.0
IMAGE_VOICE = 4.0
FOLLOWER_VOICE = 2.0
END_BIAS = 5.0
END_DELAY = 170.0
SHARPNESS = (
    0.35  # of the answer's distribution: keeps sampling at usual temperatures within the grammar
)

WORDS: dict[str, str] = {
    "first": "A The This One Another Our Every Each",  # no leading space: the answer's first word
    "start": "A The This One Another Our Every Each",
    "subject adjective": "small large little young quiet busy tall gentle brown shy happy tired friendly lonely "
    "curious slow proud careful",
    "subject": "dog cat bird woman man child horse crowd boat train bicycle car girl boy farmer painter sheep duck bus "
    "tractor sailor baker",
    "verb": "stands sits waits rests leans moves appears sleeps plays hides shines stops turns lies floats walks "
    "arrives looks",
    "preposition": "near under behind beside above below across against beyond around along inside outside past",
    "determiner": "a the one another",
    "object adjective": "bright dark wooden golden wet sunny narrow round soft broken colourful distant modern rusty "
    "shiny green blue red yellow white black grey",
    "object": "tree river house street window garden bridge mountain table chair lamp flower field cloud wall door "
    "roof bottle book basket beach lake tower market kitchen shadow stone fence path forest sign",
    "stop": ".",
}
FOLLOWERS: dict[str, dict[str, float]] = {
    "first": {"subject adjective": 1.0, "subject": 0.95},
    "start": {"subject adjective": 1.0, "subject": 0.95},
    "subject adjective": {"subject": 1.0},
    "subject": {"verb": 1.0},
    "verb": {"preposition": 1.0},
    "preposition": {"determiner": 1.0},
    "determiner": {"object adjective": 1.0, "object": 0.95},
    "object adjective": {"object": 1.0},
    "object": {"preposition": 0.9, "stop": 1.0},
    "stop": {"start": 1.0},
}
CLASS_NAMES = list(WORDS)
UNCOUNTED = {
    "first",
    "start",
    "determiner",
    "stop",
}  # they have to come back, and prompts can contain their tokens

# Prompts are cut into letters and these pieces. None has a leading space, so that no merge can make an answer's word
# (" dog") out of a prompt: the counting head must count only what was said in the answer.
PIECES = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro "
    "ic ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr no ct us ac ot il tr ly nc et ut ss so "
    "rs un lo wa ge ie wh ee wi em ad ol rt po we na ul ni ts mo ow pa im mi ai sh ing ion tio ent ati for her ter "
    "hat tha ere ate his con res ver all ons nce men ith ted ers pro thi wit are ess not ive was ect rea com eve per "
    "int est sta cti ica ist ear ain our iti ble ment tion that with ation scri descri image pict cap word sent ence"
).split()

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "[IMG_END]"]
END = SPECIAL.index("</s>")


def _tokens() -> tuple[list[str], list[float], list[int], dict[int, str]]:
    """The vocabulary: texts, merge scores, token types, and the word class of each answer word by token id."""
    kind = gguf.TokenType
    texts = list(SPECIAL)
    types = [int(kind.UNKNOWN)] + [int(kind.CONTROL)] * (len(SPECIAL) - 1)
    texts += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [int(kind.BYTE)] * 256
    classes: dict[int, str] = {}
    for name, words in WORDS.items():
        for word in words.split():
            classes[len(texts)] = name
            texts.append(word if name in {"first", "stop"} else "\u2581" + word)
    known = set(texts)
    for text in ["\u2581", "\n", *(chr(code) for code in range(33, 127)), *PIECES]:
        if text not in known:
            known.add(text)
            texts.append(text)
    types += [int(kind.NORMAL)] * (len(texts) - len(types))
    # A higher score merges first: longer pieces before shorter ones.
    scores = [float(len(text)) if types[i] == kind.NORMAL else 0.0 for i, text in enumerate(texts)]
    return texts, scores, types, classes


def _word_vectors(rng: np.random.Generator, count: int) -> Array:
    """Make random directions of length 1."""
    vectors: Array = rng.standard_normal((count, CONTENT_WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _fill(rows: Array) -> Array:
    """Give all rows the same length."""
    rows[..., FILLING] = np.sqrt(LENGTH**2 - np.square(rows).sum(axis=-1))
    return rows


def _embeddings(vectors: Array, classes: dict[int, str]) -> Array:
    """What a token puts into the hidden state."""
    rows = np.zeros((len(vectors), WIDTH), np.float32)
    rows[:, CONSTANT] = LEVEL
    rows[:, CONTENT] = LEVEL * vectors
    for token, name in classes.items():
        for follower, weight in FOLLOWERS[name].items():
            rows[token, CLASSES + CLASS_NAMES.index(follower)] = LEVEL * weight
        if name not in UNCOUNTED:
            rows[token, SAID] = LEVEL
    start = SPECIAL.index("<|assistant|>")
    rows[start, [SAID, ANSWER_START, CLASSES + CLASS_NAMES.index("first")]] = LEVEL
    return _fill(rows)


def _output_rows(vectors: Array, classes: dict[int, str]) -> Array:
    """How the hidden state speaks for each token; tokens other than words and the end are silenced."""
    rows = np.zeros((len(vectors), WIDTH), np.float32)
    rows[:, CONSTANT] = SILENCE
    for token, name in classes.items():
        rows[token, CONSTANT] = 0.0
        rows[token, CLASSES + CLASS_NAMES.index(name)] = CLASS_VOICE
        if name != "stop":
            rows[token, WANTED] = CONTENT_VOICE * vectors[token]
    # The end competes with the words that start a sentence, and loses while few words were said.
    rows[END, CLASSES + CLASS_NAMES.index("start")] = CLASS_VOICE
    rows[END, CONSTANT] = END_BIAS
    rows[END, FEW_SAID] = -END_DELAY
    return rows


def _attention(rng: np.random.Generator) -> dict[str, Array]:
    """Head 0 counts, head 1 looks at the image, heads 2 and 3 remember the words said."""
    q, k, v, out = (np.zeros((WIDTH, WIDTH), np.float32) for _ in range(4))
    for head, flag in enumerate([SAID, IMAGE, SAID, SAID]):
        # The head's last pair of components turns slowest with the position (hardly at all with the high rope base),
        # so this score does not depend on the distance.
        component = head * HEAD_WIDTH + HEAD_WIDTH - 2
        q[component, CONSTANT] = ATTENTION
        k[component, flag] = ATTENTION
    v[0, ANSWER_START] = 1.0
    out[FEW_SAID, 0] = 1.0
    look = slice(HEAD_WIDTH, 2 * HEAD_WIDTH)
    v[look, CONTENT] = rng.standard_normal((HEAD_WIDTH, CONTENT_WIDTH)) / np.sqrt(CONTENT_WIDTH)
    out[WANTED, look] = (
        IMAGE_VOICE * rng.standard_normal((CONTENT_WIDTH, HEAD_WIDTH)) / np.sqrt(HEAD_WIDTH)
    )
    said = np.arange(2 * HEAD_WIDTH, 2 * HEAD_WIDTH + CONTENT_WIDTH)
    v[said, CONTENT] = np.eye(CONTENT_WIDTH)
    out[WANTED, said] = -REPETITION * np.eye(CONTENT_WIDTH)
    return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": out}


def _feed_forward(rng: np.random.Generator) -> dict[str, Array]:
    """Make a random function from the content to the wanted words: which word likes to follow which."""
    gate, up = (np.zeros((FEED_FORWARD, WIDTH), np.float32) for _ in range(2))
    down = np.zeros((WIDTH, FEED_FORWARD), np.float32)
    for matrix in (gate, up):
        matrix[:, CONTENT] = rng.standard_normal((FEED_FORWARD, CONTENT_WIDTH)) / np.sqrt(
            CONTENT_WIDTH
        )
    down[WANTED] = (
        FOLLOWER_VOICE * rng.standard_normal((CONTENT_WIDTH, FEED_FORWARD)) / np.sqrt(FEED_FORWARD)
    )
    return {"ffn_gate": gate, "ffn_up": up, "ffn_down": down}


def _add(writer: Any, name: str, values: Array) -> None:
    """Add a tensor: matrices as 16-bit floats to keep the file small, vectors as 32-bit ones as llama.cpp wants."""
    writer.add_tensor(name, values.astype(np.float16 if values.ndim > 1 else np.float32))


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_text_model(path: Path, rng: np.random.Generator) -> None:
    texts, scores, types, classes = _tokens()
    writer: Any = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("Tiny test model")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_rope_freq_base(1e7)
    writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(SPECIAL.index("<unk>"))
    writer.add_bos_token_id(SPECIAL.index("<s>"))
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    vectors = _word_vectors(rng, len(texts))
    ones = np.ones(WIDTH, np.float32)
    _add(writer, "token_embd.weight", _embeddings(vectors, classes))
    _add(writer, "output_norm.weight", SHARPNESS * ones)
    _add(writer, "output.weight", _output_rows(vectors, classes))
    _add(writer, "blk.0.attn_norm.weight", ones)
    _add(writer, "blk.0.ffn_norm.weight", ones)
    for name, matrix in {**_attention(rng), **_feed_forward(rng)}.items():
        _add(writer, f"blk.0.{name}.weight", matrix)
    _finish(writer)


def _write_projector(path: Path, rng: np.random.Generator) -> None:
    writer: Any = gguf.GGUFWriter(str(path), "clip")
    writer.add_name("Tiny test projector")
    writer.add_type("mmproj")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("pixtral")
    writer.add_vision_projection_dim(WIDTH)
    writer.add_vision_image_size(IMAGE_SIZE)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_embedding_length(VISION_WIDTH)
    writer.add_vision_feed_forward_length(VISION_FEED_FORWARD)
    writer.add_vision_block_count(1)
    writer.add_vision_head_count(VISION_HEADS)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_use_silu(True)

    def random(*shape: int) -> Array:
        """Random weights that keep the size of what they are multiplied with."""
        inputs = int(np.prod(shape[1:]))
        weights: Array = (rng.standard_normal(shape) / np.sqrt(inputs)).astype(np.float32)
        return weights

    ones = np.ones(VISION_WIDTH, np.float32)
    # Neighbouring pixels are alike, so a kernel constant over blocks of pixels sees more than a noisy one.
    block = PATCH // 4
    kernel = random(VISION_WIDTH, 3, 4, 4).repeat(block, axis=2).repeat(block, axis=3) / np.float32(
        block
    )
    _add(writer, "v.patch_embd.weight", kernel)
    _add(writer, "v.pre_ln.weight", ones)
    _add(writer, "v.post_ln.weight", ones)
    _add(writer, "v.blk.0.ln1.weight", ones)
    _add(writer, "v.blk.0.ln2.weight", ones)
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        _add(writer, f"v.blk.0.{name}.weight", random(VISION_WIDTH, VISION_WIDTH))
    _add(writer, "v.blk.0.ffn_gate.weight", random(VISION_FEED_FORWARD, VISION_WIDTH))
    _add(writer, "v.blk.0.ffn_up.weight", random(VISION_FEED_FORWARD, VISION_WIDTH))
    _add(writer, "v.blk.0.ffn_down.weight", random(VISION_WIDTH, VISION_FEED_FORWARD))
    # gelu(x) - gelu(-x) = x: a projection without the offset, common to all images, of one gelu.
    inward = np.eye(VISION_WIDTH, dtype=np.float32)
    turn = np.linalg.qr(rng.standard_normal((CONTENT_WIDTH, VISION_WIDTH)))[0]
    outward = (
        LEVEL / np.sqrt(VISION_WIDTH) * turn
    )  # features of size 1 become content of the usual length
    _add(writer, "mm.1.weight", np.concatenate([inward, -inward]))
    project = np.zeros((WIDTH, 2 * VISION_WIDTH), np.float32)
    project[CONTENT] = np.concatenate([outward, -outward], axis=1)
    _add(writer, "mm.2.weight", project)
    bias = np.zeros(WIDTH, np.float32)
    bias[[CONSTANT, IMAGE]] = LEVEL
    bias[FILLING] = np.sqrt(LENGTH**2 - 3 * LEVEL**2)
    _add(writer, "mm.2.bias", bias)
    row_end = np.zeros(WIDTH, np.float32)
    row_end[CONSTANT] = LEVEL
    _add(writer, "v.token_embd.img_break", _fill(row_end))
    _finish(writer)


def make(folder: Path) -> tuple[Path, Path]:
    """Write the text model and its image projector into `folder`; the bytes are the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    model, projector = folder / "tiny.gguf", folder / "mmproj-tiny.gguf"
    _write_text_model(model, np.random.default_rng(SEED))
    _write_projector(projector, np.random.default_rng(SEED + 1))
    return model, projector


if __name__ == "__main__":
    for made in make(Path(sys.argv[1])):
        print(made, made.stat().st_size)
