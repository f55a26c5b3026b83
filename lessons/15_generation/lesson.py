# %% [markdown]
# # 15 Generation
#
# A network that guesses the next word, again and again, writes text. Here you build one from its weights,
# measure how undecided it is, let it write, and show what it wrote, unedited. Then it has to learn
# another style: it was pre-trained on documentation, and now it shall write Python. How much does it
# learn in 80 steps? And what does it forget?
#
# **After this lesson you can**
#
# 1. derive the loss of a language model, read a perplexity, and compare two models that cut text
#    differently;
# 2. write a decoder, prove that no token sees its future, and sample by temperature, top-k and top-p
#    with a cache;
# 3. adapt a generator in full, by LoRA and by a prefix, and report what it learned *and* what it forgot.
#
# **You need** lessons 03 (the gradient of cross-entropy), 11 (tokens), 12 (LoRA) and 14 (prefixes).
# **Time** about 90 minutes; the notebook itself runs in under a minute on two cores.
#
# **Expected result.** 80 steps on code, five draws of the training text. Perplexity on new code, which was 602 before:
# full fine-tuning 19 [19, 20], LoRA 29 [28, 29], a prefix 56 [50, 63]. Perplexity on documentation, which was 85
# before: 220 [202, 239], 244 [220, 271], 275 [234, 323]. So all three forget, adapter or not, and LoRA forgets more than
# full fine-tuning that has learned the same. With two old texts in each batch of eight it is 100 [97, 103].

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import copy
import json
import math
import random
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.generation import logits_process

# %%
from tlcourse.comparing import Comparison
from tlcourse.derivatives import finite_differences
from tlcourse.evaluation import Interval, mean_interval
from tlcourse.freezing import count_parameters
from tlcourse.language_modelling import NextTokenBlocks, NextTokens, pack
from tlcourse.language_models import load_generator, load_tokeniser
from tlcourse.library_code import library_styles
from tlcourse.locations import data_dir
from tlcourse.lora import LoRAConfig, LoRALinear, add_lora
from tlcourse.peft_files import load_adapter, save_adapter
from tlcourse.prompts import PrefixTuning

BLUE, ORANGE, GREEN = tl.plots.palette[:3]
# peft asks transformers for something under its old name. That is between the two of them.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")

# %% [markdown]
# ## The model
#
# `docgpt` has the architecture of GPT-2 in small: 4 layers, width 192, 2.6 million weights, 4,096
# tokens. It was pre-trained for this course on the docstrings of installed packages. On a GPU, and with
# a network, the same cells run on GPT-2 itself.

# %%
MODELS = {
    "tiny": "docgpt",
    "full": "hf:openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
}


def load(name):
    """A generator and its tokenizer."""
    model = load_generator(name)
    if not name.startswith("hf:"):
        return model, load_tokeniser(name).tokenizer
    repository, _, revision = name.removeprefix("hf:").partition("@")
    # Texts are cut into blocks further down, so none is too long for the tokenizer.
    options = {"revision": revision or "main", "model_max_length": 10**6}
    return model, AutoTokenizer.from_pretrained(repository, **options)


# %%
name = MODELS[run.profile]
try:
    model, tokenizer = load(name)
except ConnectionError as error:
    print(f"{name} could not be had, so this goes on with docgpt ({str(error)[:60]}...)")
    name = MODELS["tiny"]
    model, tokenizer = load(name)
model.to(run.device)
V, end = len(tokenizer), tokenizer.eos_token_id
print(f"{name}: {count_parameters(model).total:,} weights, {V:,} tokens")

# %% [markdown]
# ## Before you run anything
#
# Write down six guesses.
#
# 1. At each place `docgpt` chooses among 4,096 tokens. On documentation that it has never seen: among how
#    many equally likely tokens might it as well be undecided: 5, 100 or 1,000? And on Python code?
# 2. A text has 12 tokens, so the decoder has 12 outputs. You change the last token. How many outputs
#    change?
# 3. Always take the most probable token. Is the text that comes out more probable, less probable, or as
#    probable as what people write?
# 4. 80 steps on code: full fine-tuning, LoRA with 4 % of the numbers, a prefix with 1 %. Who learns most?
#    Who forgets most? Does one of them forget *nothing*?
# 5. The pre-trained network has read no code. Is it still better on code, after 80 steps, than the same
#    network from random weights?
# 6. You save the weights. GPT-2's head shares its matrix with the embedding, so the file holds it once.
#    You load the file into a fresh model with `strict=False`. How good is the text?
#
# ## The picture
#
# One sentence, read from left to right. Each line is one training example: what the network sees, what
# comes next, how probable the network thought it, and what it would have preferred. (A warning will
# appear; it is explained below.)

# %% tags=["allow-warning"]
sentence = "Return the sum of the array elements over the given axis."
ids = torch.tensor([[end, *tokenizer(sentence)["input_ids"]]], device=run.device)  # (1, T)
with torch.no_grad():
    probabilities = model(ids).logits[0].softmax(dim=1)  # (T, V)
print(f"{'sees':>42}   next        p       favourite")
for t in range(ids.shape[1] - 1):
    seen, following = tokenizer.decode(ids[0, 1 : t + 1])[-40:], ids[0, t + 1].item()
    p, best = probabilities[t, following].item(), probabilities[t].argmax().item()
    print(f"{seen:>42} | {tokenizer.decode([following]):10}  {p:.4f}  {tokenizer.decode([best])}")

# %% [markdown]
# **The warning**, where it appears. The tokenizer of `docgpt` has one special token: it begins and ends a text, and
# fills up short texts in a batch. `transformers` warns, once, if it meets this token and no `attention_mask`:
# *if* it is filling, it should be masked. Here it is not filling. The network has to see that a text begins, so
# the advice would be wrong. The honest mend is to say that this model knows no padding. The second line answers
# another message in advance: the library finds the loss by the name of the class, and "GPT2LMHeadModel"
# does not say which it is.

# %%
model.config.pad_token_id = None
model.loss_type = "ForCausalLM"

# %% [markdown]
# Back to the picture. A text of $T$ tokens gives $T$ examples at once. (The first line sees only the token that stands for
# "a text begins here".) No label was needed: the text is its own label, moved by one place. Two questions
# follow. What is the loss of a whole text? And how can one pass give all lines, if no line may see the
# word that it has to guess?
#
# ## The loss: from the chain rule
#
# Let $x_1, \dots, x_T$ be the tokens of a text. For two events $P(A, B) = P(A)\,P(B \mid A)$. Apply that again and
# again:
#
# $$P(x_1, \dots, x_T) = P(x_1)\, P(x_2 \mid x_1)\, P(x_3 \mid x_1 x_2) \cdots = \prod_{t=1}^T P(x_t \mid x_{<t}).$$
#
# Nothing is assumed here. *Any* distribution over texts can be written as guesses of the next token. So it
# is enough to learn those, with parameters $\theta$. The most likely $\theta$ is the one that makes the
# training text most probable. Take the logarithm, turn the sign, divide by the number of tokens:
#
# $$L(\theta) = -\frac1T \ln P_\theta(x_1, \dots, x_T) = \frac1T \sum_{t=1}^T -\ln P_\theta(x_t \mid x_{<t}).$$
#
# That is the **negative log-likelihood**, in nats per token. At each place it is the cross-entropy of a
# classifier with $V$ classes.
#
# **Perplexity** is $\exp(L)$. Suppose a network gives each of $n$ tokens the probability $1/n$ and all others zero. Then
# $L = \ln n$ and the perplexity is $n$: the number of sides of a fair die that is as hard to guess. Also
#
# $$\exp(L) = \Big(\prod_t \frac{1}{P(x_t \mid x_{<t})}\Big)^{1/T},$$
#
# the geometric mean of "one in how many". By hand: probabilities $\frac12, \frac14, \frac1{10}$. The text has
# probability $\frac1{80}$, and the perplexity is $80^{1/3} = 4.31$.

# %% tags=["nbval-check-output"]
by_hand = torch.tensor([1 / 2, 1 / 4, 1 / 10])
loss = -by_hand.log().mean()
print(f"loss {loss:.3f} nats per token, perplexity {loss.exp():.2f}, cube root of 80: {80 ** (1 / 3):.2f}")

# %% [markdown]
# Now the sentence above, once by hand and once by the library.

# %%
own = probabilities[:-1].gather(1, ids[0, 1:, None])[:, 0]  # P(x_t | x_<t)
loss = -own.log().mean()
with torch.no_grad():
    theirs = model(input_ids=ids, labels=ids).loss
torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-4)
print(f"loss {loss:.3f} nats per token, perplexity {loss.exp():.1f}")
print(f"probability of the whole sentence: {own.log().sum().exp():.0e}")

# %% [markdown]
# Look at the last call: `labels=ids`, the *same* ids. `transformers` moves them by one place itself. Who
# moves them beforehand trains the network to guess the token after the next, and sees no error message.
# (The course's `NextTokenBlocks` moves, and its `NextTokens` does not.)
#
# ### The gradient
#
# Lesson 03 found it for one place: with logits $z$ and $p = \operatorname{softmax}(z)$ the gradient is $p$ minus one-hot.
# Here $T$ places are averaged. Write $z_{tk}$ for the logit of token $k$ at place $t$, $p_{tk}$ for its
# probability, and $y_t$ for the token that came. The logit $z_{tk}$ is felt in the term of place $t$ only:
#
# $$\frac{\partial L}{\partial z_{tk}} = \frac1T \big(p_{tk} - [k = y_t]\big).$$
#
# Each place pushes down what it expected and pushes up what came, and what came gets as much as all others lose
# together. Two referees, in float64:

# %%
generator = torch.Generator().manual_seed(0)
z = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
y = torch.tensor([4, 0, 0])
F.cross_entropy(z, y).backward()
formula = (z.softmax(dim=1) - F.one_hot(y, 5)).detach() / len(y)
moved = z.detach().clone()
slopes = finite_differences(lambda: F.cross_entropy(moved, y), moved)
torch.testing.assert_close(z.grad, formula)
torch.testing.assert_close(slopes, formula, rtol=1e-6, atol=1e-8)

# %% [markdown]
# ## The decoder
#
# All lines of the picture in one pass: that is what the **causal mask** is for. In attention (lesson 11)
# token $i$ mixes the values $v_j$ of the others, with weights from $s_{ij} = q_i \cdot k_j / \sqrt d$. Here a
# token may look back and at itself, and not ahead:
#
# $$a_{ij} = \frac{\exp(s_{ij} + m_{ij})}{\sum_l \exp(s_{il} + m_{il})}, \qquad
# m_{ij} = \begin{cases} 0 & j \le i \\ -\infty & j > i. \end{cases}$$
#
# As $\exp(-\infty) = 0$, a future token gets weight 0 *and* drops out of the sum. This is the only place in the network
# where tokens meet: normalisation, feed-forward and head work on each token by itself. So by induction over the
# layers, the output at $i$ is a function of $x_1, \dots, x_i$ alone.
#
# Build the network from its weights. One thing is peculiar to GPT-2: its linear layers (`Conv1D`) keep their
# matrix as (inputs, outputs).

# %%
W = {k.removeprefix("transformer."): v.double() for k, v in model.state_dict().items()}
num_layers, num_heads = model.config.n_layer, model.config.n_head


def linear(x, name):
    return x @ W[name + ".weight"] + W[name + ".bias"]


def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], W[name + ".weight"], W[name + ".bias"])


# %%
def attention(x, name, visible):
    """x: (B, T, D); visible: (T, T), True where row i may look at column j -> (B, T, D)."""
    q, k, v = (
        part.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, T, d)
        for part in linear(x, name + ".c_attn").chunk(3, dim=-1)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, T, T)
    scores = scores.masked_fill(~visible, -math.inf)
    mixed = scores.softmax(dim=-1) @ v
    return linear(mixed.transpose(1, 2).flatten(2), name + ".c_proj")


# %%
def block(x, name, visible):
    x = x + attention(norm(x, name + ".ln_1"), name + ".attn", visible)
    wide = F.gelu(linear(norm(x, name + ".ln_2"), name + ".mlp.c_fc"), approximate="tanh")
    return x + linear(wide, name + ".mlp.c_proj")


def decoder(x, causal=True):
    """Embedded tokens (B, T, D) -> logits (B, T, V)."""
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    x = x + W["wpe.weight"][: x.shape[1]]
    for i in range(num_layers):
        x = block(x, f"h.{i}", visible.tril() if causal else visible)
    return norm(x, "ln_f") @ W["wte.weight"].T  # the head is the embedding's matrix again


# %% [markdown]
# That is all of GPT-2. Is it? Compare with the library, in float64.

# %%
exact = copy.deepcopy(model).double()
with torch.no_grad():
    ours, theirs = decoder(W["wte.weight"][ids]), exact(ids).logits
gap = (ours - theirs).abs().max().item()
print(f"largest difference of the logits: {gap:.0e}, where their spread is {theirs.std():.1f}")
assert gap < 1e-8

# %% [markdown]
# ### Does a token hear its future?
#
# Two tests. First change the last token, and see which outputs move. Then ask the gradient: how strongly does
# output $i$ answer to the embedding of token $j$? One backward pass for each output fills one row.


# %%
def outputs_that_move(causal):
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % V
    with torch.no_grad():
        before, after = (decoder(W["wte.weight"][x], causal)[0] for x in (ids, other))
    return (before - after).abs().amax(dim=1) > 0


def hearing(causal):
    """Size of the gradient of output i with respect to embedding j, shape (T, T)."""
    x = W["wte.weight"][ids].detach().requires_grad_(True)
    answers = decoder(x, causal)[0].logsumexp(dim=1)
    return torch.stack([
        torch.autograd.grad(answer, x, retain_graph=True)[0][0].norm(dim=1) for answer in answers
    ])  # fmt: skip


# %%
for causal in (True, False):
    moves = outputs_that_move(causal)
    print(f"causal={causal!s:5}  outputs that move: {moves.sum()} of {len(moves)}")
    assert moves.sum() == (1 if causal else len(moves))
heard = {"with the causal mask": hearing(True).cpu(), "without": hearing(False).cpu()}
assert heard["with the causal mask"].triu(1).eq(0).all() and heard["without"].triu(1).gt(0).any()

# %%
words_of = ["(start)", *(tokenizer.decode([i]).strip() for i in ids[0, 1:])]
fig, axes = tl.plots.subplots(1, 2, figsize=(9.5, 4.3), sharey=True)
for ax, (title, sizes) in zip(axes, heard.items()):
    ax.imshow((sizes > 0).float(), cmap="Greys", vmin=0, vmax=2, interpolation="nearest")
    ax.set_xticks(range(len(words_of)), words_of, rotation=90)
    ax.set_yticks(range(len(words_of)), words_of)
    ax.set(title=title, xlabel="embedding of token j")
axes[0].set_ylabel("output at token i")
words = "Grey where output i answers to token j: with the mask on and below the diagonal, "
tl.plots.alt(fig, words + "without it everywhere.")

# %% [markdown]
# **Guess 2.** One. And the gradient of everything above the diagonal is not small but exactly zero. A network *without*
# the mask would see the answer in its input; its training loss would go to zero, and it could write nothing, as
# at the end of a text there is no future to copy from.
#
# ## What is a good perplexity?
#
# A number needs others beside it. First two styles of text, both from the interpreter's own standard library,
# which was *no* part of the pre-training: **docs**, the prose in its docstrings, and **code**, its functions
# with docstrings and comments taken out. `tlcourse.library_code` reads them. The split is by file, so no file
# stands on two sides.

# %%
files = library_styles()  # "train code", "test docs", ... -> a list of texts for each file
print({part: len(texts) for part, texts in files.items()}, "files")

# %%
for part in ("test docs", "test code"):
    texts = [text for file in files[part] for text in file]
    print(f"{part}: {len(files[part])} files, {len(texts)} texts. The first two:\n")
    print(*(text[:300] for text in texts[:2]), sep="\n\n", end="\n\n")

# %% [markdown]
# Texts have different lengths. A language model need not pad: put all texts in a row, an end token behind each, and cut
# the row into blocks. `pack` does that. Each block has one token more than the network sees: inputs are all but
# the last, targets all but the first.


# %%
def blocks(part, most=48, draw=None, length=128):
    """Blocks spread evenly over a part; with a draw, the first ones of its files in random order."""
    chosen = list(files[part])
    if draw is not None:
        random.Random(draw).shuffle(chosen)
    packed = pack([text for file in chosen for text in file], tokenizer, length)
    spread = torch.linspace(0, len(packed) - 1, min(most, len(packed))).long()
    return packed[:most] if draw is not None else packed[spread]


# %%
test = {style: blocks(f"test {style}") for style in ("docs", "code")}


def nats(model, blocks):
    """Loss of each block in nats per token, shape (N,)."""
    with torch.no_grad():
        parts = [
            F.cross_entropy(
                model(input_ids=x[:, :-1]).logits.transpose(1, 2), x[:, 1:], reduction="none"
            ).mean(dim=1)
            for x in blocks.to(run.device).split(8)
        ]
    return torch.cat(parts).cpu()


# %%
loader = NextTokenBlocks(test["docs"], batch_size=8, shuffle=False)
by_library = tl.evaluate(NextTokens(model), loader).loss
print(f"ours {nats(model, test['docs']).mean():.4f}, tl.evaluate {by_library:.4f} nats per token")
assert abs(nats(model, test["docs"]).mean().item() - by_library) < 1e-3

# %% [markdown]
# Two baselines that need no network:
#
# - **uniform**: every token has $1/V$; loss $\ln V$, perplexity $V$;
# - **unigram**: token $k$ has the share that it has in other text of the style, whatever came before. To keep a token
#   that was never seen from being impossible, one is added to each count.


# %%
def unigram(counted, blocks):
    """Loss of the shares of tokens in some blocks, on other blocks."""
    counts = torch.bincount(counted[:, 1:].flatten(), minlength=V) + 1
    return -(counts / counts.sum()).log()[blocks[:, 1:]].mean(dim=1)


counted = {"docs": blocks("val docs", 999), "code": blocks("train code", 640, draw=0)}
print("style  baseline   nats per token           perplexity")
for style, x in test.items():
    rows = {"uniform": torch.full((len(x),), math.log(V)), "unigram": unigram(counted[style], x)}
    for kind, losses in (rows | {name[:9]: nats(model, x)}).items():
        band = mean_interval(losses.numpy())
        print(f"{style:6} {kind:9}  {band!s:24} {math.exp(band.mean):7.0f}")

# %% [markdown]
# (Intervals over the blocks, as if they were independent.) **Guess 1.** On documentation `docgpt` is as undecided as a die
# with 85 sides, where the shares of the tokens alone leave 911. On code it has 645, and *counting tokens is five times
# better* (126): the network is sure of English, and what comes is not English. It has read about Python and not
# Python.
#
# ### When the tokens differ
#
# Is perplexity 20 better than perplexity 90? Build a "model" that takes the text *byte* by byte, and knows only how
# frequent each of the 256 bytes is.

# %%
def text_of(blocks):
    return tokenizer.decode(blocks[:, 1:].flatten().tolist(), skip_special_tokens=True)


texts = {style: np.frombuffer(text_of(x).encode(), dtype=np.uint8) for style, x in test.items()}
print("style  model          perplexity of a token   bytes in a token   bits per byte")
for style, bytes_ in texts.items():
    counts = np.bincount(np.frombuffer(text_of(counted[style]).encode(), np.uint8), minlength=256) + 1
    rows = {"bytes, counted": (-np.log(counts / counts.sum())[bytes_].mean(), 1.0)}
    rows[name[:9]] = (nats(model, test[style]).mean().item(), len(bytes_) / test[style][:, 1:].numel())
    for kind, (loss, length) in rows.items():
        print(f"{style:6} {kind:14} {math.exp(loss):16.1f} {length:20.2f}", end="")
        print(f"{loss / math.log(2) / length:17.2f}")

# %% [markdown]
# The counting model has by far the smaller perplexity on documentation, and it is a bad model. A die with few sides is
# easy, but it has to be thrown for every letter. What can be compared is the price of the *text*: all nats, divided by
# something that no tokenizer changes. Usually that is its length in bytes:
#
# $$\text{bits per byte} = \frac{\text{nats per token}}{\ln 2 \cdot \text{bytes per token}} .$$
#
# On documentation `docgpt` needs 1.82 bits for a byte, and counting 4.59. On code the two are alike (4.68 and 4.62), though one
# perplexity is 645 and the other 25. And a token of code has only 2 bytes, one of documentation 3.5: these tokens were
# made for English. In this lesson the tokenizer stays the same, so from here on nats per token will do. Whoever compares
# `docgpt` with GPT-2 must use bits per byte.
#
# ## Writing
#
# ### Temperature
#
# The network gives logits $z$. Divide them by a **temperature** $T > 0$ before the softmax:
#
# $$p_k(T) = \frac{\exp(z_k / T)}{\sum_l \exp(z_l / T)} \;\propto\; p_k(1)^{1/T} .$$
#
# For $T \to 0$ the largest logit takes all (**greedy**). For $T \to \infty$ all tokens become alike. In between, how
# does the entropy $H = -\sum_k p_k \ln p_k$ move? Put $\beta = 1/T$ and $Z = \sum_k e^{\beta z_k}$. Then
# $\ln p_k = \beta z_k - \ln Z$, and with the mean logit $m = \sum_k p_k z_k$
#
# $$H = \ln Z - \beta m, \qquad \frac{d \ln Z}{d\beta} = m, \qquad
# \frac{dm}{d\beta} = \sum_k p_k z_k^2 - m^2 = \operatorname{Var}(z).$$
#
# So $\dfrac{dH}{d\beta} = m - m - \beta \operatorname{Var}(z)$, and as $\dfrac{d\beta}{dT} = -\dfrac{1}{T^2}$,
#
# $$\frac{dH}{dT} = \frac{\operatorname{Var}(z)}{T^3} \ge 0 .$$
#
# Warmer is always more undecided, in every place of every text. Check it on a real next token:


# %%
def entropy(logits):
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


z = theirs[0, 2]  # after "Return the", float64
for T in (0.5, 1.0, 2.0):
    p = (z / T).softmax(dim=0)
    formula = (p @ z**2 - (p @ z) ** 2) / T**3
    measured = (entropy(z / (T + 1e-4)) - entropy(z / (T - 1e-4))) / 2e-4
    perplexity = entropy(z / T).exp()
    print(f"T = {T}: entropy {entropy(z / T):.2f} (a die with {perplexity:.0f} sides), dH/dT {formula:.3f}")
    torch.testing.assert_close(formula, measured, rtol=1e-5, atol=1e-8)

# %% [markdown]
# ### Cutting the tail: top-k and top-p
#
# Thousands of tokens with a tiny probability each are not tiny together. Every few words one of them is drawn, and the
# text derails. Two remedies cut the tail off:
#
# - **top-k** keeps the $k$ most probable tokens;
# - **top-p** (nucleus) keeps the smallest set of most probable tokens whose probabilities add up to at least $p$. Where the
#   network is sure, that is one token; where it is not, it is many.


# %%
def top_k(logits, k):
    """Logits (..., V) with -inf outside the k largest."""
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def top_p(logits, p):
    """Logits (..., V) with -inf outside the smallest set that has probability p or more."""
    ordered, order = logits.sort(dim=-1, descending=True)
    shares = ordered.softmax(dim=-1)
    before = shares.cumsum(dim=-1) - shares  # probability of all that stand before
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < p)
    return logits.masked_fill(~keep, -math.inf)


# %%
z = torch.randn(50, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
pairs = {
    "temperature": (z / 0.7, logits_process.TemperatureLogitsWarper(0.7)),
    "top-k": (top_k(z, 12), logits_process.TopKLogitsWarper(12)),
    "top-p": (top_p(z, 0.9), logits_process.TopPLogitsWarper(0.9)),
}
for kind, (ours, theirs_) in pairs.items():
    assert torch.equal(ours, theirs_(None, z))
    kept = ours.isfinite().sum(dim=1)
    print(f"{kind:11} equals transformers; tokens kept: {kept.min()} to {kept.max()} of {z.shape[1]}")

# %% [markdown]
# ### The loop, and the cache
#
# To write: feed the tokens, take the last row of logits, choose a token, append it, again. Done naively, step $n$ works
# through all tokens before it once more. But look at the mask: key and value of token $j$, in every layer, depend on tokens
# up to $j$ alone. What is appended later cannot change them. So keep them (the **KV cache**), and feed the
# new token only.


# %%
def write(model, ids, num_new, choose, cached=True):
    """Append ``num_new`` tokens; ``choose`` turns logits (1, V) into a token (1, 1)."""
    cache, fed, rows, new = None, 0, [], ids
    with torch.no_grad():
        for _ in range(num_new):
            out = model(input_ids=new, past_key_values=cache, use_cache=cached)
            fed, rows = fed + new.shape[1], rows + [out.logits[:, -1]]
            ids = torch.cat([ids, choose(out.logits[:, -1])], dim=1)
            cache, new = (out.past_key_values, ids[:, -1:]) if cached else (None, ids)
    return ids, torch.stack(rows), fed


def greedy(logits):
    return logits.argmax(dim=-1, keepdim=True)


# %%
prompt = torch.tensor([[end, *tokenizer("Return the")["input_ids"]]], device=run.device)
with_cache, rows, fed = write(model, prompt, 40, greedy)
without, rows_without, fed_without = write(model, prompt, 40, greedy, cached=False)
assert torch.equal(with_cache, without)
gap = (rows - rows_without).abs().max().item()
print(f"largest difference of the logits {gap:.0e}; tokens fed: {fed} with cache, {fed_without} without")
assert gap < {"cpu": 1e-3, "cuda": 5e-2}[run.device.type]
P = prompt.shape[1]
assert fed == P + 39 and fed_without == 40 * P + 40 * 39 // 2

# %% [markdown]
# For $n$ new tokens after a prompt of $P$: $P + n - 1$ tokens with the cache, $nP + n(n-1)/2$ without. Linear against
# quadratic. The price is memory: $2 \cdot \text{layers} \cdot D$ numbers per token.
#
# `model.generate` is this loop. Greedy must give the same tokens. With sampling, too, if both draw from the same
# random numbers:


# %%
def sample(temperature=1.0, k=0, p=1.0):
    """A chooser: temperature first, then the cuts, then a draw."""

    def choose(logits):
        logits = logits / temperature
        logits = top_k(logits, k) if k else logits
        logits = top_p(logits, p) if p < 1 else logits
        return torch.multinomial(logits.softmax(dim=-1), 1)

    return choose


# %%
masked = {"attention_mask": torch.ones_like(prompt), "pad_token_id": end, "eos_token_id": None}
theirs_ = model.generate(prompt, max_new_tokens=40, do_sample=False, **masked)
assert torch.equal(theirs_, with_cache)
options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95}
torch.manual_seed(0)
theirs_ = model.generate(prompt, max_new_tokens=40, **options, **masked)
torch.manual_seed(0)
ours, _, _ = write(model, prompt, 40, sample(0.8, 20, 0.95))
assert torch.equal(ours, theirs_)
print("the same tokens, greedy and sampled")

# %% [markdown]
# Three arguments of `generate` deserve a word. `attention_mask`: of ones, as nothing is padding. `pad_token_id`: what fills up shorter texts in a batch of several. And
# `eos_token_id=None` here means "do not stop at the end token", so that lengths are equal. Also, a `temperature` has no effect
# unless `do_sample=True`.
#
# ### What it writes
#
# The first text of each kind, from seed 0, not chosen and not edited. ("⏎" marks the end token: from there on the network
# begins another text.)

# %%
def show(text, width=92):
    text = text.replace(tokenizer.eos_token, " ⏎ ")
    for line in text.split("\n"):
        print("    " + "\n    ".join(line[i : i + width] for i in range(0, max(len(line), 1), width)))


ways = {"greedy": greedy, "T = 0.5": sample(0.5), "T = 1": sample(1.0), "T = 2": sample(2.0)}
ways["T = 1, top-p .9"] = sample(1.0, p=0.9)
for kind, choose in ways.items():
    torch.manual_seed(0)
    print(f"{kind}:")
    show(tokenizer.decode(write(model, prompt, 50, choose)[0][0, 1:]))

# %% [markdown]
# Greedy goes in circles. At $T = 0.5$ and $1$ there are sentences that could stand in a manual, on functions that do not
# exist. At $T = 2$ it is salad. This is what 2.6 million weights can do; larger networks differ in what they know, not in
# how they are sampled.
#
# How probable are these texts, for the network itself? Take 12 openings of test docstrings. Let the network go on, greedily and at $T = 1$, and
# compare with what the authors wrote. Measure nats per token, and how many of the runs of three tokens had occurred before
# in the same text.


# %%
def repeated(ids):
    """Share of the runs of three tokens that stood in the same text before."""
    runs = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
    return 1 - len(set(runs)) / len(runs)


opening, length = 8, 60
real = test["docs"][:12, : opening + length].to(run.device)  # (12, 68)
torch.manual_seed(0)
written = {"people": real}
for kind, choose in {"greedy": greedy, "T = 1": sample(1.0), "T = 0.7": sample(0.7)}.items():
    written[kind] = write(model, real[:, :opening], length, choose)[0]

# %%
price, again = {}, {}
for kind, x in written.items():
    with torch.no_grad():
        logits = model(input_ids=x[:, :-1]).logits[:, opening - 1 :]
    losses = F.cross_entropy(logits.transpose(1, 2), x[:, opening:], reduction="none").mean(dim=1)
    price[kind] = mean_interval(losses.cpu().numpy())
    again[kind] = mean_interval([repeated(row[opening:]) for row in x.tolist()])
    print(f"{kind:8} nats per token {price[kind]!s:23} repeated {again[kind]}")
assert price["greedy"].high < price["people"].low and again["greedy"].low > again["people"].high
assert abs(price["T = 1"].mean - price["people"].mean) < 1.5

# %% [markdown]
# **Guess 3.** Far more probable, and worse. Greedy text costs 1.34 nats per token, that of people 4.32, and two thirds
# of its runs of three tokens were there before. People do not write the most probable text. (Holtzman et al. 2019 show
# this for large models.) At $T = 1$ the samples are about as surprising as real text, and that is what the training asked for:
# draw from the distribution, and its surprise is its entropy.
#
# ## A new style
#
# Now let it write Python. The three ways, each with a training loop that you know:
#
# - **full**: all weights;
# - **LoRA** of rank 8 beside every matrix of the layers (`c_attn`, `c_proj`, `c_fc`). No head is new, so none is named in
#   `modules_to_save`. The head *is* the embedding, and both stay frozen;
# - **prefix**: 16 trained keys and values in each layer, which every token may look at.


# %%
def fresh(seed=0, pretrained=True):
    """The generator without dropout, so that arms can be compared."""
    m = copy.deepcopy(model) if pretrained else GPT2LMHeadModel(model.config).to(run.device).eval()
    for module in m.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(seed)
    return m


# %%
lora = LoRAConfig(
    rank=8, alpha=16.0, target_modules=("c_attn", "c_proj", "c_fc"), modules_to_save=()
)
build = {
    "full fine-tuning": fresh,
    "LoRA": lambda: add_lora(fresh(), lora),
    "prefix tuning": lambda: PrefixTuning(fresh(), 16),
}

# %% [markdown]
# Before any training: do LoRA and prefix compute what **peft** computes? Give both the same numbers ($B$ not zero, a prefix that
# matters), and compare logits.

# %%
theirs_config = peft.LoraConfig(
    r=8, lora_alpha=16, target_modules=list(lora.target_modules), fan_in_fan_out=True,
    task_type="CAUSAL_LM",
)
ours, theirs_ = add_lora(fresh(), lora), peft.get_peft_model(fresh(), theirs_config).eval()
parts = {n.replace(".default.weight", ""): p for n, p in theirs_.named_parameters() if "lora" in n}
for part, parameter in ours.named_parameters():
    if parameter.requires_grad:
        nn.init.normal_(parameter, std=0.02)
        parts["base_model.model." + part].data.copy_(parameter.data)
gaps = {}
with torch.no_grad():
    gaps["LoRA"] = (ours(ids).logits - theirs_(input_ids=ids).logits).abs().max().item()

# %%
theirs_config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
ours, theirs_ = PrefixTuning(fresh(), 16), peft.get_peft_model(fresh(), theirs_config).eval()
ours.load_prompt_embeddings(theirs_.prompt_encoder["default"].embedding.weight)
mask = torch.ones_like(ids)
with torch.no_grad():
    gaps["prefix"] = (ours(ids).logits - theirs_(input_ids=ids, attention_mask=mask).logits).abs().max().item()
print({kind: f"{gap:.0e}" for kind, gap in gaps.items()}, "largest difference from peft")
assert max(gaps.values()) < {"cpu": 1e-4, "cuda": 1e-2}[run.device.type]

# %% [markdown]
# (`fan_in_fan_out=True` tells peft that GPT-2 keeps its matrices turned. Without it peft warns and sets it itself. The course's
# library looks at the layer.)
#
# A short run of each, on the same blocks. It is a glimpse; the measurement comes below.

# %%
num_steps = {"tiny": 10, "full": 80}[run.profile]
rates = {"full fine-tuning": 1e-3, "LoRA": 1e-2, "prefix tuning": 1e-1}
if name != "docgpt":  # rates of the order that larger networks take
    rates = {"full fine-tuning": 1e-4, "LoRA": 1e-3, "prefix tuning": 3e-2}
train = blocks("train code", 8 * num_steps, draw=0)


def adapt(arm):
    adapted = build[arm]()
    config = tl.TrainConfig(lr=rates[arm], num_steps=num_steps, warmup_steps=1, progress=False)
    tl.fit(NextTokens(adapted), NextTokenBlocks(train, 8, seed=0), None, config)
    return adapted


# %%
adapted = {"before": fresh()} | {arm: adapt(arm) for arm in build}
few = {style: x[:24] for style, x in test.items()}
live = {arm: {s: nats(m, x).mean().item() for s, x in few.items()} for arm, m in adapted.items()}
print(f"after {num_steps} steps:     trained   code, nats  (perplexity)   docs, nats  (perplexity)")
for arm, found in live.items():
    trained = 0 if arm == "before" else count_parameters(adapted[arm]).trainable
    print(f"{arm:17} {trained:11,}" + "".join(
        f"{found[s]:13.2f} {math.exp(found[s]):13.0f}" for s in ("code", "docs")))  # fmt: skip
for arm in ("full fine-tuning", "LoRA"):
    assert live[arm]["code"] < live["before"]["code"] - 0.1

# %% [markdown]
# ### Switched off
#
# LoRA and prefix leave the weights alone. Take them away, and what was forgotten is back: not nearly, but to the last bit.

# %%
off = copy.deepcopy(adapted["LoRA"])
for layer in off.modules():
    if isinstance(layer, LoRALinear):
        layer.lora_B.data.zero_()
with torch.no_grad():
    as_before = adapted["before"](ids).logits
    assert torch.equal(off(ids).logits, as_before)
    assert torch.equal(adapted["prefix tuning"].body(ids).logits, as_before)
    assert not torch.equal(adapted["LoRA"](ids).logits, as_before)
print("switched off: the same bits as before")

# %% [markdown]
# Full fine-tuning can do that only by keeping the old weights, that is, two whole models.
#
# ### Saved and loaded
#
# Before the numbers, one accident has to be made impossible. GPT-2's head and its embedding are one matrix, so a file
# holds it once, under the name of the embedding. Here is that file, loaded into a model that was built with a head of its own:

# %%
state = {k: v for k, v in adapted["full fine-tuning"].state_dict().items() if k != "lm_head.weight"}
untied = copy.deepcopy(model.config)
untied.tie_word_embeddings = False
torch.manual_seed(7)
careless = GPT2LMHeadModel(untied).to(run.device).eval()
careless.load_state_dict(state, strict=False)  # no complaint
lost = nats(careless, few["code"]).mean().item()
print(f"perplexity on code: {math.exp(lost):,.0f}, a die with all sides has {V:,}")
assert lost > live["full fine-tuning"]["code"] + 1
try:
    careless.load_state_dict(state)
except RuntimeError as error:
    print("strict:", str(error).splitlines()[-1].strip())

# %% [markdown]
# **Guess 6.** As bad as guessing: all layers are the trained ones, and the head is random. Nothing said so. Three rules: load strictly (the
# default); let the library tie what is tied; and compare the logits of what you load with those of what you
# saved. The last one catches every accident of this kind:

# %%
kept_here = tempfile.TemporaryDirectory()
folder = Path(kept_here.name)
with torch.no_grad():
    expected = {arm: m(ids).logits for arm, m in adapted.items()}
    path = tl.save_model(adapted["full fine-tuning"], folder / "full.safetensors")
    full = tl.load_model(path, fresh(pretrained=False))
    assert torch.equal(full(ids).logits, expected["full fine-tuning"])
    save_adapter(adapted["LoRA"], folder / "lora")
    assert torch.equal(load_adapter(fresh(), folder / "lora")(ids).logits, expected["LoRA"])
    theirs_ = peft.PeftModel.from_pretrained(fresh(), folder / "lora").eval()
    gap = (theirs_(input_ids=ids).logits - expected["LoRA"]).abs().max().item()
for file in (path, folder / "lora" / "adapter_model.safetensors"):
    print(f"{file.name:27} {file.stat().st_size / 1000:9,.0f} kB")
print(f"identical logits; peft reads our file with a difference of {gap:.0e}")
assert gap < {"cpu": 1e-4, "cuda": 1e-2}[run.device.type]

# %% [markdown]
# ## The experiment: learned and forgotten
#
# Now 80 steps of 8 blocks of 128 tokens. Arms: the three above; full fine-tuning with **replay**, where two of the eight
# blocks in each batch are old text, from the packages of the pre-training; and, as a control, the same network **from
# random weights**. The rate of each arm was chosen by the loss on validation code, on an extra draw of the
# training text (replay takes that of full fine-tuning). Then five other draws, the same for all arms. The test
# text was read once: code, docs of the standard library, and docs from held-out files of the packages, the very style of
# the pre-training.
#
# ```
# python benchmarks/adapting_a_generator.py
# ```

# %%
recorded = json.loads((data_dir() / "results" / "adapting_a_generator.json").read_text("utf-8"))
before = recorded["before"]["test"]
scores = {
    style: Comparison({arm: [r[style] for r in runs] for arm, runs in recorded["runs"].items()})
    for style in before
}
print("chosen rates:", recorded["lr"])
for style, comparison in scores.items():
    print(f"\n{style}: before {before[style]:.3f} nats per token (perplexity {math.exp(before[style]):.0f})")
    print(comparison.table(reference="full fine-tuning"))

# %% [markdown]
# In one picture, as perplexities. The dashed line is the pre-trained network.

# %%
fig, axes = tl.plots.subplots(1, 2, figsize=(9.5, 3.2), sharey=True)
told = []
for ax, style, title in zip(axes, ("code", "docs"), ("learned: code", "forgotten: docs")):
    bands = {arm: scores[style].interval(arm) for arm in scores[style].scores}
    bands = {arm: Interval(*np.exp([b.mean, b.low, b.high])) for arm, b in bands.items()}
    tl.plots.plot_intervals(bands, "perplexity", math.exp(before[style]), ax=ax)
    ax.set_xscale("log")
    ax.set(title=title)
    told += [f"{style}, {arm} {band.mean:.0f}" for arm, band in bands.items()]
axes[0].set_xticks([20, 50, 100, 200, 500], [20, 50, 100, 200, 500])
axes[1].set_xticks([100, 200, 500, 1000, 2000], [100, 200, 500, 1000, 2000])
for ax in axes:
    ax.minorticks_off()
tl.plots.alt(fig, "Perplexities; before: code 600, docs 85. " + "; ".join(told))

# %% [markdown]
# ### Who learned most?

# %%
code, docs = scores["code"], scores["docs"]
pairs = [("LoRA", "full fine-tuning"), ("prefix tuning", "LoRA"), ("prefix tuning", "from random weights")]
pairs += [("from random weights", "full fine-tuning"), ("full with replay", "full fine-tuning")]
print("nats per token".ljust(44) + "on code".ljust(26) + "on docs")
for a, b in pairs:
    print(f"{a} minus {b}".ljust(44) + f"{code.difference(a, b)!s:26}{docs.difference(a, b)}")
unigram_code = recorded["baselines"]["unigram_code"]
print(f"\nbefore: code {before['code']:.2f}, unigram {unigram_code:.2f}, docs {before['docs']:.2f}")

# %% [markdown]
# **Guess 4, learning.** The more numbers are trained, the more is learned. LoRA ends 0.39 [0.36, 0.41] nats per token above full
# fine-tuning, the prefix 0.68 [0.58, 0.77] above LoRA. All of them now beat counting, which was better than the network before.
#
# **Guess 4, forgetting.** With the adapter *on*, neither forgets less than full fine-tuning. On the docs of the standard library
# LoRA forgets a little more, by 0.10 [0.05, 0.16]; on those of the packages the interval holds 0. That the old weights are still in the
# file does not help the model that runs. Nothing is forgotten only where the adapter is off.
#
# **Guess 5.** Pre-training on prose is worth a nat per token on code (0.99 [0.94, 1.04]), if all weights may move. A prefix on the
# pre-trained network is no better than random weights, trained in full: 0.08 [-0.00, 0.16].
#
# **Replay** is the cheap remedy. Two old blocks in eight cost 0.04 [0.02, 0.06] on code and save 0.79 [0.72, 0.86] of the 0.96 that were
# forgotten on documentation. It needs the old text, which not everyone has.

# %%
three = ("full fine-tuning", "LoRA", "prefix tuning")
for a, b, low in (("LoRA", "full fine-tuning", 0.2), ("prefix tuning", "LoRA", 0.3),
                  ("from random weights", "full fine-tuning", 0.6)):  # fmt: skip
    assert code.difference(a, b).low > low
assert all(code.interval(arm).high < unigram_code - 0.3 for arm in three) and unigram_code < before["code"]
assert all(docs.interval(arm).low > before["docs"] + 0.5 for arm in three)
assert docs.difference("LoRA", "full fine-tuning").low > 0
assert abs(code.difference("prefix tuning", "from random weights").mean) < 0.2

# %%
assert docs.difference("full with replay", "full fine-tuning").high < -0.5
assert code.difference("full with replay", "full fine-tuning").high < 0.15

# %% [markdown]
# ### Learning and forgetting, traded
#
# One point per arm is not the whole story. A smaller rate learns less and forgets less. And one can stop on the way: take
# weights *between* the pre-trained and the adapted ones, $\theta_0 + a\,(\theta - \theta_0)$ with $0 \le a \le 1$ (lesson 08; for LoRA
# that is $a B$ in place of $B$). Each way gives a curve. Further down and further left is better.

# %%
shares = recorded["settings"]["shares"]


def line(arm, draw):
    """Losses on (code, docs) from the pre-trained model to the adapted one, shape (5, 2)."""
    found = recorded["runs"][arm][draw]
    stops = [before, *(found["line"][f"{share:g}"] for share in shares), found]
    return np.array([[stop["code"], stop["docs"]] for stop in stops])


lines = {a: np.mean([line(a, d) for d in range(5)], axis=0) for a in ("full fine-tuning", "LoRA")}

# %% jupyter={"source_hidden": true}
fig, (left, right) = tl.plots.subplots(1, 2, figsize=(9.8, 4.0), sharey=True)
looks = dict(zip(recorded["runs"], zip(tl.plots.palette, tl.plots.markers)))
for arm, (color, marker) in looks.items():
    x, y = code.interval(arm), docs.interval(arm)
    if arm != "from random weights":
        left.errorbar(
            x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]],
            yerr=[[y.mean - y.low], [y.high - y.mean]], color=color, marker=marker, capsize=3, ls="",
            label=arm,
        )  # fmt: skip
    if arm in lines:
        left.plot(*lines[arm].T, color=color, lw=1, ls="-", marker=".", ms=4)
    if arm in recorded["tuning"] and arm != "from random weights":
        tried = np.array([[r["code"], r["docs"]] for r in recorded["tuning"][arm].values()])
        right.plot(*tried.T, color=color, marker=marker, ls=":", label=arm)
        for (a, b), rate in zip(tried, recorded["tuning"][arm]):
            right.annotate(f" {float(rate):g}", (a, b), fontsize=8, color=color)
for ax, start, title in ((left, before, "test, part of the way"),
                         (right, recorded["before"]["val"], "validation, other rates")):  # fmt: skip
    ax.plot(start["code"], start["docs"], "k*", ms=9, label="before")
    ax.set(xlabel="loss on code (nats per token)", title=title)
left.set_ylabel("loss on docs (nats per token)")
right.legend(fontsize=9)
words = "Loss on code against loss on docs. Left: replay is lowest; the line of full fine-tuning lies below "
tl.plots.alt(fig, words + "that of LoRA; the prefix is up and right. Right: larger rates go up, and at first left.")

# %% [markdown]
# To compare two curves, compare them where they have learned *the same*: on the line of full fine-tuning, find the loss on
# docs at the place where its loss on code is that of LoRA, by linear interpolation, draw by draw.

# %%
at_equal, halfway = [], []
for draw in range(5):
    full_line, lora_end = line("full fine-tuning", draw), line("LoRA", draw)[-1]
    same = np.interp(lora_end[0], full_line[::-1, 0], full_line[::-1, 1])
    at_equal.append(lora_end[1] - same)
    share_learned, share_forgotten = (full_line[0] - full_line[2]) / (full_line[0] - full_line[-1])
    halfway.append([share_learned, share_forgotten])
print("docs, LoRA minus full at the same loss on code:", mean_interval(at_equal))
for word, values in zip(("learned", "forgotten"), np.transpose(halfway)):
    print(f"half of the way: share of what the whole way has {word}: {mean_interval(values)}")
assert mean_interval(at_equal).low > 0.5
assert mean_interval([a - b for a, b in halfway]).low > 0.5

# %% [markdown]
# Where LoRA and full fine-tuning have learned the same, LoRA has forgotten *more*: 0.95 [0.88, 1.03] nats per token. Why? The step
# from prose to code is long. Perhaps it needs more directions than rank 8 has, so that those few must turn far; this lesson
# does not test it. And it is the opposite of what Biderman et al. found with 7 billion weights (below).
#
# The second line is the useful one. Half of the way to the fine-tuned weights has 90 % of the learning, at 12 % of the forgetting. It
# costs nothing but the old weights. A rate chosen by the loss on code alone goes further than is good for the documents.
#
# ### What they write
#
# From the first draw, seed 0, temperature 0.8, no cuts, not chosen and not edited. First as code, then as documentation.

# %%
written_by = {"before": recorded["before_samples"]}
written_by |= {arm: runs[0]["samples"] for arm, runs in recorded["runs"].items()}
for style, prompt_text in recorded["settings"]["prompts"].items():
    print(f"--- {style}, begins with {prompt_text!r}")
    for arm, samples in written_by.items():
        print(f"{arm}:")
        show(samples[style].replace("<|end|>", tokenizer.eos_token))

# %% [markdown]
# What full fine-tuning writes has the shape of code: `def`, `self`, indents, `return`. It is not code: names are torn, brackets stay
# open. LoRA and the prefix write worse, as their losses say. ("�" is a byte that is no letter by itself.) Asked for documentation,
# all but the arm with replay answer with code. Look how far a loss of 3.0 nats is from a program.
#
# ## Where it fails
#
# **Perplexity is not truth.** It says how surprised the network is. A fluent false sentence has a low perplexity. So has
# text that the network has read: what is in the pre-training data must not be in the test. (`docgpt` never saw the
# standard library. What GPT-2 or a model of today has read, nobody can tell you, and Python's library is
# surely among it: with such a model call the code *not new*.)
#
# **One number for two things.** "Fine-tuned, loss fell" says nothing about what was lost. It costs one more evaluation
# to know.
#
# **Small.** 2.6 million weights, 80 steps, one pair of styles, one test text. The intervals are over draws of the training
# text. They say nothing about other models. Biderman et al. (2024), with 7 billion weights and much more
# text, found that LoRA learns less and forgets *less* (section 4.2).
#
# **A prefix takes room**: 16 of the 256 places, and its keys take attention from the text.
#
# **Merging.** A LoRA that was folded into the weights cannot be switched off any more.
#
# ## Explorer: temperature
#
# The next token after a prompt, and one text from it. What does the temperature do where the network is sure, and where it is not?
# At which temperature does the text stop being one?

# %%
openings = {
    "Return the sum": "Return the sum",
    "If True, the": "If True, the",
    "Raises an error if the": "Raises an error if the",
    "def close(self): (adapted)": "def close(self):\n    ",
}


# %% jupyter={"source_hidden": true}
def draw(opening, temperature, top, cut):
    writer = adapted["full fine-tuning"] if "adapted" in opening else adapted["before"]
    ids = torch.tensor([[end, *tokenizer(openings[opening])["input_ids"]]], device=run.device)
    choose = sample(temperature, k=min(top, V), p=cut)
    torch.manual_seed(0)
    text, rows, _ = write(writer, ids, 40, choose)
    cool, warm = rows[0, 0].softmax(dim=0), (rows[0, 0] / temperature).softmax(dim=0)
    kept = top_k(rows[0] / temperature, min(top, V))
    kept = (top_p(kept, cut) if cut < 1 else kept)[0].isfinite()
    best = cool.topk(15).indices
    fig, ax = tl.plots.subplots(figsize=(9, 3.6))
    places = np.arange(15)
    ax.bar(places - 0.2, cool[best].cpu(), 0.4, color="lightgrey", label="temperature 1")
    colors = [BLUE if kept[i] else ORANGE for i in best]
    ax.bar(places + 0.2, warm[best].cpu(), 0.4, color=colors, label=f"temperature {temperature:g}")
    ax.set_xticks(places, [tokenizer.decode([i]).strip() or "␣" for i in best.tolist()], rotation=50)
    ax.set(ylabel="probability", ylim=(0, 1))
    ax.legend()
    die = entropy(rows[0, 0] / temperature).exp().item()
    ax.set_title(f"a die with {die:.0f} sides; {int(kept.sum())} of {V:,} tokens can be drawn", fontsize=10)
    written = tokenizer.decode(text[0, 1:]).replace(tokenizer.eos_token, " ⏎ ").replace("\n", "↵")
    lines_ = [written[i : i + 105] for i in range(0, len(written), 105)]
    fig.supxlabel("\n".join(lines_).replace("$", r"\$"), fontsize=9, x=0.02, ha="left", family="monospace")
    tl.plots.alt(fig, f"15 most probable tokens at temperature {temperature:g}. Text: {written}")


# %%
tl.widgets.explore(
    draw,
    opening=tl.widgets.choice(list(openings), label="text begins"),
    temperature=tl.widgets.slider(0.1, 3.0, 0.1, value=1.0),
    top=tl.widgets.choice([1, 5, 20, 100, ("all", 10**6)], value=10**6, label="top-k", drag=True),
    cut=tl.widgets.slider(0.5, 1.0, 0.05, value=1.0, label="top-p"),
)

# %% [markdown]
# (Blue can be drawn, orange is cut off.)
#
# ## Quiz

# %%
tl.quiz("15")

# %% [markdown]
# ## Exercise
#
# [Generation: the exercise](../exercises/15_generation.ipynb) asks for a loss in two currencies, attention behind a cache, the
# probabilities that a token is drawn from, and a gradient when some targets do not count; at the end you judge a report.
#
# ## Papers
#
# - Radford, Wu, Child, Luan, Amodei and Sutskever 2019, *Language models are unsupervised multitask learners*,
#   section 2 (GPT-2).
# - Vaswani et al. 2017, *Attention is all you need*, section 3.2.3 (the causal mask), arXiv:1706.03762.
# - Holtzman, Buys, Du, Forbes and Choi 2019, *The curious case of neural text degeneration*, section 3.1 (top-p),
#   arXiv:1904.09751.
# - Fan, Lewis and Dauphin 2018, *Hierarchical neural story generation*, section 5.4 (top-k), arXiv:1805.04833.
# - Sennrich, Haddow and Birch 2015, *Neural machine translation of rare words with subword units*, section 3.2,
#   arXiv:1508.07909 (byte-pair encoding, from which GPT-2's tokens come).
# - Hu et al. 2021, *LoRA*, section 4.1, arXiv:2106.09685; Li and Liang 2021, *Prefix-tuning*, section 4,
#   arXiv:2101.00190.
# - Biderman et al. 2024, *LoRA learns less and forgets less*, sections 4.1 to 4.3, arXiv:2405.09673.
# - Wortsman et al. 2021, *Robust fine-tuning of zero-shot models* (WiSE-FT), section 3, arXiv:2109.01903.
#
# ## Glossary
#
# | term | meaning | Chinese |
# |---|---|---|
# | decoder | network whose outputs see only what came before | 解码器 |
# | causal mask | what hides the future in attention | 因果掩码 |
# | negative log-likelihood | minus the logarithm of the probability of the data | 负对数似然 |
# | perplexity | exp of the loss per token; sides of a fair die | 困惑度 |
# | bits per byte | loss per byte of text, whatever the tokens | 每字节比特数 |
# | greedy decoding | always the most probable token | 贪心解码 |
# | temperature | what logits are divided by before a draw | 温度 |
# | top-k, top-p (nucleus) | draw from the k most probable, or from the first that reach p | 前 k 采样，核采样 |
# | KV cache | keys and values kept from step to step | 键值缓存 |
# | tied weights | one matrix in two places | 权重共享 |
# | forgetting | loss on the old task after training on a new one | 遗忘 |
# | replay | old examples mixed into new batches | 重放 |
