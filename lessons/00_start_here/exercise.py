# %% [markdown]
# # Exercise 00: warm-up
#
# Two small functions and one paragraph, to see how exercises and checks work. You will meet both
# functions again: every accuracy in this course is computed like this.
#
# **Points:** 5. **Time:** about 10 minutes. **Before this:** lesson 00.
#
# Write your answer in place of the line `raise NotImplementedError(...)`, run the cell, then run
# the check below it. A check counts nothing; repeat it as often as you like.

# %% tags=["setup"]
import tlcourse as tl

run = tl.setup(seed=0)

# %%
import numpy as np

# %% [markdown]
# ## Question 1 (1 point): accuracy
#
# A network predicted a class for each image. Which fraction is right?


# %% question="00.q1"
def accuracy(predictions, targets):
    """Fraction of the predictions that equal their target.

    Args:
        predictions: integer array, shape (N,), N >= 1.
        targets: integer array, shape (N,).

    Returns:
        A number in [0, 1].
    """
    ### BEGIN SOLUTION
    return float(np.mean(predictions == targets))
    ### END SOLUTION


# %% check="00.q1"
tl.check("00.q1", accuracy)

# %% [markdown]
# ## Question 2 (2 points): accuracy from batches
#
# A large test set is read in batches, and the last batch is often shorter. You kept the accuracy
# and the size of each batch. What is the accuracy over all images?
#
# Before you write: for batches of 100 and 2 images with accuracies 0.9 and 0.0, is it nearer to
# 0.45 or to 0.88?


# %% question="00.q2"
def overall_accuracy(batch_accuracies, batch_sizes):
    """Accuracy over all images, from the accuracy of each batch.

    Args:
        batch_accuracies: array, shape (B,), each in [0, 1].
        batch_sizes: integer array, shape (B,), each >= 1.

    Returns:
        A number in [0, 1].
    """
    ### BEGIN SOLUTION
    correct = batch_accuracies * batch_sizes  # images that were right, batch by batch
    return float(correct.sum() / batch_sizes.sum())
    ### END SOLUTION


# %% check="00.q2"
tl.check("00.q2", overall_accuracy)

# %% [markdown]
# ## Question 3 (2 points, read by a person): your own transfer
#
# Describe in two to four sentences something that *you* learned faster because you already knew
# something else. What did you keep, what did you have to learn anew, and was there anything that
# the old knowledge made harder?

# %% [markdown] question="00.q3"
# <!-- BEGIN SOLUTION -->
# An example of a full answer: I learned Dutch after German. Much of the vocabulary and the word
# order could be kept; spelling and pronunciation were new. Some words look the same and mean
# something else (*bellen* is to ring, not to bark), and there the old knowledge misled me. That is
# negative transfer: where source and target differ unnoticed, the source does harm.
# <!-- END SOLUTION -->
