# %% [markdown]
# # Exercise 14: Prompts and prefixes
#
# You compute the gate, take a prefix out of attention again, write its gradients, pool what peft
# gives back, and keep the account of numbers and context. Then somebody reports that prompts do not
# work, and you decide what the report is worth.
#
# | question | | points |
# |---|---|---|
# | 1 | the gate | 3 |
# | 2 | as if there were no prefix | 2 |
# | 3 | the gradients of a prefix | 4 |
# | 4 | pooling after a prompt | 3 |
# | 5 | what it costs | 3 |
# | 6 | judgement, in your own words | 4 |
#
# **How it works.** Replace each `raise NotImplementedError(...)` by your answer, run the cell,
# and then the check below it. It says *right*, or shows the first input on which your answer
# differs, with a hint. Try as often as you like: a check costs nothing and records nothing. Most
# right answers unlock something to look at.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import warnings

import numpy as np
import torch

BLUE, ORANGE, GREEN = tl.plots.palette[:3]
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft, an old name

# %% [markdown]
# ## Question 1. The gate (3 points)
#
# One head. $N$ tokens ask; there are $T$ words, of which `mask` says which are real (1) and which are
# padding (0), and $P$ virtual tokens, which all may be looked at. Scores are $q \cdot k / \sqrt d$.
# Return the share of attention that goes to the prefix, $\lambda$, for each asking token, and the
# output of the head.


# %% question="14.q1"
def gated_attention(q, K, V, mask, prefix_K, prefix_V):
    """Attention with a prefix.

    He et al. 2022, section 3.1, arXiv:2110.04366.

    Args:
        q: queries, shape (N, d).
        K, V: keys and values of the words, shape (T, d).
        mask: 1 for a real word, 0 for padding, shape (T,).
        prefix_K, prefix_V: keys and values of the prefix, shape (P, d).

    Returns:
        dict with "gate", shape (N,), and "output", shape (N, d).
    """
    ### BEGIN SOLUTION
    d = q.shape[1]
    words = np.exp(q @ K.T / np.sqrt(d)) * mask  # (N, T); padding gets no weight
    prefix = np.exp(q @ prefix_K.T / np.sqrt(d))  # (N, P)
    total = words.sum(axis=1) + prefix.sum(axis=1)
    output = (words @ V + prefix @ prefix_V) / total[:, None]
    return {"gate": prefix.sum(axis=1) / total, "output": output}
    ### END SOLUTION


# %% check="14.q1"
right_1 = tl.check("14.q1", gated_attention)

# %% [markdown]
# When it is right: the gate over the strength of a key, for 1, 8 and 64 virtual tokens of which only
# one has the key, and the others are zero. Where is the gate at strength 0?

# %%
if right_1:
    rng, ax = np.random.default_rng(0), tl.plots.subplots(figsize=(7, 3))[1]
    q, (K, V) = rng.normal(size=(1, 32)), rng.normal(size=(2, 30, 32))
    strengths = np.linspace(-10, 20, 61)
    for place, count in enumerate((1, 8, 64)):
        zeros, one = np.zeros((count, 32)), np.eye(count, 1)
        keys = [zeros + one * strength * q / np.linalg.norm(q) for strength in strengths]
        gates = [gated_attention(q, K, V, np.ones(30), key, zeros)["gate"][0] for key in keys]
        look = {"color": tl.plots.palette[place], "ls": tl.plots.line_styles[place]}
        ax.plot(strengths, gates, label=f"P = {count}", **look)
    ax.set(xlabel="strength of the key, in unit queries", ylabel="gate", ylim=(0, 1))
    ax.legend()
    tl.plots.alt(ax, "Three rising curves, from the share of the zero keys up to 1; more tokens start higher.")

# %% [markdown]
# ## Question 2. As if there were no prefix (2 points)
#
# Somebody hands you the attention weights of the *first* layer, with a prefix of $P$ tokens in front,
# and nothing else: no queries, no keys. Return the weights on the words as they would be without the
# prefix.


# %% question="14.q2"
def without_prefix(weights, num_virtual):
    """Weights on the words, had there been no prefix.

    Args:
        weights: with the prefix, shape (N, P + T); the prefix comes first, each row sums to 1.
        num_virtual: P, at least 1.

    Returns:
        weights on the words, shape (N, T).
    """
    ### BEGIN SOLUTION
    words = weights[:, num_virtual:]
    return words / words.sum(axis=1, keepdims=True)
    ### END SOLUTION


# %% check="14.q2"
right_2 = tl.check("14.q2", without_prefix)

# %% [markdown]
# That it can be done at all is the theorem: the prefix has taken its share, and changed nothing else.
#
# ## Question 3. The gradients of a prefix (4 points)
#
# The head of question 1, without padding. $G$ holds $\partial L / \partial o'_i$ for each of the $N$
# outputs. Return the gradients of the keys and of the values of the prefix.


# %% question="14.q3"
def prefix_gradients(q, K, V, prefix_K, prefix_V, G):
    """Gradients of a prefix.

    Args:
        q: queries, shape (N, d).
        K, V: keys and values of the words, shape (T, d).
        prefix_K, prefix_V: shape (P, d).
        G: gradient of the loss with respect to the outputs, shape (N, d).

    Returns:
        dict with "keys" and "values", shape (P, d) each.
    """
    ### BEGIN SOLUTION
    num, d = prefix_K.shape
    scores = np.exp(q @ np.concatenate([prefix_K, K]).T / np.sqrt(d))  # (N, P + T)
    weights = scores / scores.sum(axis=1, keepdims=True)
    outputs = weights @ np.concatenate([prefix_V, V])  # with the prefix
    better = G @ prefix_V.T - (G * outputs).sum(axis=1, keepdims=True)  # (N, P)
    on_prefix = weights[:, :num]
    return {"keys": (on_prefix * better).T @ q / np.sqrt(d), "values": on_prefix.T @ G}
    ### END SOLUTION


# %% check="14.q3"
right_3 = tl.check("14.q3", prefix_gradients)

# %% [markdown]
# When it is right: gradient descent with your gradients. One query is asked to say $(1, 0)$; the one
# word says $(0, 1)$. Watch key and value share the work.

# %%
if right_3:
    q, K, V = np.array([[1.0, 1.0]]), np.zeros((1, 2)), np.array([[0.0, 1.0]])
    keys, values, target = np.zeros((1, 2)), np.zeros((1, 2)), np.array([[1.0, 0.0]])
    for step in range(301):
        weight = 1 / (1 + np.exp(-(q @ keys.T)[0, 0] / np.sqrt(2)))
        output = (1 - weight) * V + weight * values
        if step % 100 == 0:
            print(
                f"step {step:3}: gate {weight:.2f}, value {values[0].round(2)}, output {output[0].round(2)}"
            )
        slopes = prefix_gradients(q, K, V, keys, values, output - target)
        keys, values = keys - 0.5 * slopes["keys"], values - 0.5 * slopes["values"]

# %% [markdown]
# ## Question 4. Pooling after a prompt (3 points)
#
# peft's prompt tuning gives back a vector for each virtual token *and* each real one, virtual ones
# first. You have the mask of the real ones only, as the tokeniser made it. Return the mean over the
# real tokens of each text.


# %% question="14.q4"
def pool_after_prompt(hidden, attention_mask):
    """One vector for each text.

    Args:
        hidden: what peft gave back, shape (B, P + T, D); P may be 0.
        attention_mask: 1 for a real token, 0 for padding, shape (B, T); at least one 1 in a row.

    Returns:
        shape (B, D).
    """
    ### BEGIN SOLUTION
    num_virtual = hidden.shape[1] - attention_mask.shape[1]
    weight = attention_mask[:, :, None]
    return (hidden[:, num_virtual:] * weight).sum(axis=1) / weight.sum(axis=1)
    ### END SOLUTION


# %% check="14.q4"
right_4 = tl.check("14.q4", pool_after_prompt)

# %% [markdown]
# When it is right: MiniLM in peft's hands, and your features against the library's own prompt tuning,
# which cuts the virtual tokens off by itself.

# %%
if right_4:
    import peft

    from tlcourse.prompts import PromptTuning
    from tlcourse.text import pad

    minilm = tl.load_backbone("minilm")
    inputs = pad(minilm.preprocess(["Open a file.", "Wait for the lock, then start the thread."]))
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5)
    theirs = peft.get_peft_model(minilm.body, config).eval()

# %%
if right_4:
    ours = PromptTuning(minilm.body, 5)
    ours.load_prompt_embeddings(theirs.prompt_encoder["default"].embedding.weight)
    with torch.no_grad():
        hidden, real = theirs(**inputs).last_hidden_state, inputs["attention_mask"]
        minilm.body = ours  # pools by itself, as the virtual tokens are cut off
        gap = np.abs(pool_after_prompt(hidden.numpy(), real.numpy()) - minilm(**inputs).numpy()).max()
    print(f"{hidden.shape[1]} vectors came back for {real.shape[1]} tokens; largest difference {gap:.0e}")

# %% [markdown]
# ## Question 5. What it costs (3 points)
#
# A model has `layers` layers of width `width`, and in each `kv_heads` heads of keys and values, of
# size `head_size`. (In many decoders of today these are fewer than the heads of the queries, so
# `kv_heads * head_size` may be less than `width`.) It has `positions` positions, and virtual tokens
# use up some. For the methods `"prompt"`, `"prefix"`, and `"mlp"` (a prefix made by an MLP from $P$
# vectors of the model's width: one linear layer from `width` to `hidden`, tanh, one linear layer to
# all keys and values of a virtual token, both with biases) return three whole numbers:
#
# - `"trained"`: numbers that are trained;
# - `"saved"`: numbers that must be kept when training is over (the MLP's output replaces the MLP);
# - `"text"`: positions that are left for the text.


# %% question="14.q5"
def cost(method, num_virtual, layers, width, kv_heads, head_size, hidden, positions):
    """Trained numbers, saved numbers, and context that is left.

    Li and Liang 2021, section 4.3, arXiv:2101.00190.

    Args:
        method: "prompt", "prefix" or "mlp".
        num_virtual: virtual tokens.
        layers, width, kv_heads, head_size: of the model.
        hidden: width of the MLP; of no meaning for the other methods.
        positions: of the model.

    Returns:
        dict with "trained", "saved" and "text", whole numbers.
    """
    ### BEGIN SOLUTION
    for_each = 2 * layers * kv_heads * head_size  # keys and values of one virtual token
    saved = num_virtual * (width if method == "prompt" else for_each)
    trained = saved
    if method == "mlp":
        trained = num_virtual * width + (width + 1) * hidden + (hidden + 1) * for_each
    return {"trained": trained, "saved": saved, "text": positions - num_virtual}
    ### END SOLUTION


# %% check="14.q5"
right_5 = tl.check("14.q5", cost)

# %% [markdown]
# When it is right: a decoder with 32 layers of width 4,096, eight heads of 128 for keys and values,
# and 8,192 positions.

# %%
if right_5:
    for method in ("prompt", "prefix", "mlp"):
        for num in (20, 200):
            found = cost(method, num, 32, 4096, 8, 128, 512, 8192)
            print(f"{method:7} {num:4} tokens: trained {found['trained']:12,}  saved {found['saved']:12,}  "
                  f"left for text {found['text']:,}")  # fmt: skip

# %% [markdown]
# ## Question 6. Judgement (4 points)
#
# This report reaches you:
#
# > "We tried prompt tuning on our encoder, for 9 topics and 400 labelled mails: 20 virtual tokens, peft's defaults, AdamW at 2e-5, the
# > rate that always works for us in full fine-tuning, three epochs. As features we took `out.last_hidden_state.mean(dim=1)` with a linear head on top, trained along.
# > Accuracy was 71.0 % against 71.5 % of logistic regression on frozen features: prompt tuning *hurts*. We then tried prefix tuning at rate 1 and
# > got chance: prefixes are unable to learn. Initialising the prompt with the names of the topics gave 71.9 % in one run, so we recommend that."
#
# Answer in about 170 words. What did the prompt learn at this rate, and why? What is wrong with the
# features? What do the differences show? What happened to the prefix, and what would you do first?

# %% [markdown] question="14.q6"
# **Your answer**
#
# <!-- BEGIN SOLUTION -->
# The rate: AdamW moves a number by about the rate in a step. 400 mails, three epochs: some 75 steps
# (batches of 16), so a number moves by 0.0015 at most. peft draws prompts with deviation 1, and
# LayerNorm makes what a step does proportional to rate / deviation. The prompt stayed where it was
# drawn, at random: they measured their head. Tune the rate on validation over several powers of ten,
# up to 1 and more, or start at the size of real embeddings.
#
# The features: peft gives back the 20 virtual tokens as well, and padding; the plain mean takes them
# all in. Cut the first 20 off, mask the padding.
#
# The differences: half a point, one run each, no interval. Neither "hurts" nor "names help" follows.
# Five or more paired draws, the interval of the difference. Head only, with the same treatment, is
# the right baseline.
#
# The prefix: keys and values enter attention without normalisation; at rate 1 they grew to many times
# real ones and drowned the text. That says nothing about ability; 0.01 to 0.1 may work.
#
# First: pooling, then a grid of rates on validation.
# <!-- END SOLUTION -->

# %% [markdown]
# ## If you want more (not graded)
#
# - A prefix with $t_p \to -\infty$ changes nothing. Why is it a bad start all the same? (Look at the
#   gradients.)
# - Show that $P$ virtual tokens with one and the same key are worth as much as one, with which key
#   and value?
# - Write the gate of *two* prefixes in front of one text, trained for two tasks. What does each see
#   of the other?
