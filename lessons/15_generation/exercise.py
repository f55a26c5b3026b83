# %% [markdown]
# # Exercise 15: generation
#
# You report a loss in two currencies, let the last tokens of a text look back (and only back), turn
# logits into what is drawn from, and find the gradient when some targets do not count. Then somebody
# has fine-tuned a generator for the help desk, and you say what the report is worth.
#
# | question | | points |
# |---|---|---|
# | 1 | perplexity and bits per byte | 3 |
# | 2 | causal attention behind a cache | 4 |
# | 3 | temperature, top-k, top-p | 4 |
# | 4 | the gradient, if some targets do not count | 4 |
# | 5 | judgement, in your own words | 4 |
#
# **How it works.** Replace each `raise NotImplementedError(...)` by your answer, run the cell,
# and then the check below it. It says *right*, or shows the first input on which your answer
# differs, with a hint. Try as often as you like: a check costs nothing and records nothing. Most
# right answers unlock something to look at.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np
import torch

from tlcourse.language_models import load_generator, load_tokeniser

BLUE, ORANGE, GREEN = tl.plots.palette[:3]

# %% [markdown]
# ## Question 1. Perplexity and bits per byte (3 points)
#
# Several texts of different length stand in one rectangle, filled up at the end. You get the natural
# logarithm of the probability that the model gave to each token, which tokens are real, and how many
# bytes the texts have together. Return the perplexity of a token over **all** real tokens, and the bits per
# byte of the texts.


# %% question="15.q1"
def report(log_p, real, num_bytes):
    """Two measures of one loss.

    Args:
        log_p: ln P(token | tokens before), shape (texts, tokens); any number where not real.
        real: True for tokens, False for filling, shape (texts, tokens).
        num_bytes: of all texts together.

    Returns:
        dict with "perplexity" and "bits_per_byte".
    """
    ### BEGIN SOLUTION
    nats = -log_p[real].sum()
    return {
        "perplexity": np.exp(nats / real.sum()),
        "bits_per_byte": nats / np.log(2) / num_bytes,
    }
    ### END SOLUTION


# %% check="15.q1"
right_1 = tl.check("15.q1", report)

# %% [markdown]
# When it is right: the same text for `docgpt`, once as it is and once in capital letters.

# %%
if right_1:
    model, tokenizer = load_generator("docgpt"), load_tokeniser("docgpt").tokenizer
    model.config.pad_token_id = None
    text = "Raises an error if the input is not a sequence of numbers."
    for version in (text, text.upper()):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(version)["input_ids"]]])
        with torch.no_grad():
            log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        found = report(log_p.double().numpy(), np.ones(log_p.shape, bool), len(version.encode()))
        print(f"{ids.shape[1] - 1:3} tokens, {len(version)} bytes:", end="")
        print(f" perplexity {found['perplexity']:7.1f}, bits per byte {found['bits_per_byte']:.2f}")

# %% [markdown]
# The second text costs more in both currencies, but by different factors: its tokens are shorter.
#
# ## Question 2. Causal attention behind a cache (4 points)
#
# One head. Keys and values of the first tokens wait in a cache, so `k` and `v` hold all $T$ tokens, but `q` holds
# only the **last** $n$ of them. A token looks back and at itself:
#
# $$a_{ij} \propto \exp\big(q_i \cdot k_j / \sqrt d\big) \ \text{ for tokens } j \text{ that are not after } i, \qquad o_i = \sum_j a_{ij} v_j .$$
#
# Mind which token a row of `q` belongs to. With $n = T$ it is attention without a cache.


# %% question="15.q2"
def causal_attention(q, k, v):
    """Outputs of the last n tokens.

    Args:
        q: queries of the last n tokens, shape (n, d), n at most T.
        k: keys of all tokens, shape (T, d).
        v: values of all tokens, shape (T, e).

    Returns:
        outputs, shape (n, e).
    """
    ### BEGIN SOLUTION
    n, T = len(q), len(k)
    token = np.arange(T - n, T)  # the rows of q are the last n tokens
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores = np.where(np.arange(T) <= token[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v
    ### END SOLUTION


# %% check="15.q2"
right_2 = tl.check("15.q2", causal_attention)

# %% [markdown]
# When it is right: token by token with a cache gives what all tokens at once give.

# %%
if right_2:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 6, 4))
    at_once = causal_attention(q, k, v)
    in_turn = [causal_attention(q[t : t + 1], k[: t + 1], v[: t + 1])[0] for t in range(6)]
    print("largest difference:", np.abs(at_once - np.stack(in_turn)).max())

# %% [markdown]
# ## Question 3. Temperature, top-k, top-p (4 points)
#
# From logits to the probabilities that a token is drawn from. In this order:
#
# 1. divide the logits by `temperature`;
# 2. keep the `k` largest;
# 3. of what is left, with its probabilities summing to 1 again, keep the smallest set of most probable
#    tokens whose probabilities add up to **at least** `p`; the token that reaches `p` is in it;
# 4. what is left sums to 1.
#
# No two logits are equal.


# %% question="15.q3"
def next_token_probabilities(logits, temperature, k, p):
    """What the next token is drawn from.

    Holtzman et al. 2019, section 3.1, arXiv:1904.09751 (top-p).

    Args:
        logits: shape (V,).
        temperature: > 0.
        k: at least 1, at most V.
        p: in (0, 1]; with 1 nothing is cut.

    Returns:
        probabilities, shape (V,), in the order of the logits.
    """
    ### BEGIN SOLUTION
    order = np.argsort(-logits)[:k]  # the k largest, from the top
    z = logits[order] / temperature
    shares = np.exp(z - z.max())
    shares /= shares.sum()
    before = np.cumsum(shares) - shares  # probability of all that stand before
    shares[before >= p] = 0
    probabilities = np.zeros(len(logits))
    probabilities[order] = shares / shares.sum()
    return probabilities
    ### END SOLUTION


# %% check="15.q3"
right_3 = tl.check("15.q3", next_token_probabilities)

# %% [markdown]
# When it is right: how many tokens does top-p keep, place by place? (`docgpt`, $p = 0.9$.)

# %%
if right_3:
    model, tokenizer = load_generator("docgpt"), load_tokeniser("docgpt").tokenizer
    model.config.pad_token_id = None
    ids = [tokenizer.eos_token_id, *tokenizer("If True, the values are sorted in place.")["input_ids"]]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    sizes = [(next_token_probabilities(row, 1.0, len(row), 0.9) > 0).sum() for row in logits[:-1]]
    ax = tl.plots.subplots(figsize=(7.5, 3))[1]
    ax.bar(range(len(sizes)), sizes, color=BLUE)
    ax.set_yscale("log")
    ax.set_xticks(range(len(sizes)), [tokenizer.decode([i]).strip() for i in ids[1:]], rotation=60)
    ax.set(xlabel="token to come", ylabel="tokens kept, of 4,096")
    words_ = f"Tokens that top-p keeps before each token: from {min(sizes)} to {max(sizes)}."
    tl.plots.alt(ax, words_)

# %% [markdown]
# ## Question 4. The gradient, if some targets do not count (4 points)
#
# You train a generator on questions with answers, and only the tokens of the *answers* shall count. Other
# targets are set to $-100$, by custom. The loss is the mean of $-\ln p_{t, y_t}$ over the places that **count**.
# Return the loss and its gradient with respect to the logits.


# %% question="15.q4"
def masked_loss(logits, targets):
    """Cross-entropy over the targets that count, and its gradient.

    Args:
        logits: shape (T, V); row t is the guess of target t.
        targets: token in [0, V), or -100 where the place does not count; shape (T,). At least one counts.

    Returns:
        dict with "loss", a number, and "gradient", shape (T, V).
    """
    ### BEGIN SOLUTION
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.flatnonzero(targets != -100)
    gradient = np.zeros_like(p)
    gradient[rows] = p[rows]
    gradient[rows, targets[rows]] -= 1
    return {
        "loss": -np.log(p[rows, targets[rows]]).mean(),
        "gradient": gradient / len(rows),
    }
    ### END SOLUTION


# %% check="15.q4"
right_4 = tl.check("15.q4", masked_loss)

# %%
if right_4:
    z = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([-100, -100, 3, 0, 6])
    loss = torch.nn.functional.cross_entropy(z, y)
    loss.backward()
    mine = masked_loss(z.detach().numpy(), y.numpy())
    print("difference from torch: loss", abs(mine["loss"] - loss.item()), end="")
    print(", gradient", np.abs(mine["gradient"] - z.grad.numpy()).max())

# %% [markdown]
# ## Question 5. Judgement (4 points)
#
# This report reaches you:
#
# > "We fine-tuned all weights of a 1.3-billion model on 4,000 of our support chats. Perplexity on chats fell
# > from 31 to 9. A competitor's model, with another tokenizer, has 12 on its own web page, so ours is better.
# > We compared with LoRA at the same learning rate, 2e-5: it reached only 22, so LoRA does not work for
# > generation. Perplexity was measured on chats drawn at random; many customers write several times. The
# > general abilities cannot have suffered, as the loss went down throughout. Attached are the three best of
# > 50 samples."
#
# Answer in about 170 words. What do the perplexities show, and what not? What about LoRA? What about "cannot have suffered"? What
# do you say to the samples, and what would you ask for first?

# %% [markdown] question="15.q5"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# Perplexity: 31 to 9 on their own chats says that the style was learned, if test chats are new. Split at random,
# chats of one customer stand on both sides, and copied signatures and repeated complaints flatter the number:
# split by customer. 9 against 12 cannot be compared: other text, other tokenizer. On the same text, in bits per
# byte, it could.
#
# LoRA: 2e-5 is a rate for all weights; LoRA wants one of ten times or more. They compared rates. Tune each on
# validation, several draws of the training chats, paired intervals.
#
# Forgetting: the loss that fell is that of chats. What the model could before was not measured at all, and full
# fine-tuning is expected to lose some of it. Measure perplexity (and tasks) on the old text before and after;
# remedies are replay, weights between old and new, or an adapter that can be switched off.
#
# Samples: the three best of 50 show what is possible, not what is usual. I want the first 20 from fixed seeds, unedited, with
# settings of sampling. First I would ask for a new split by customer and the loss on old text.
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - Show that a text drawn at temperature 1 has, in the mean, a surprise per token that equals the mean entropy of
#   the places it goes through. Measure both.
# - Beam search keeps the $b$ most probable beginnings. Write it, and see whether its texts are more probable than greedy ones, and
#   whether you like them more.
# - Train a LoRA on code with `target_modules=("c_attn",)` only, and one on `("c_fc", "c_proj")`. Which learns more per
#   number trained? Tune each.
