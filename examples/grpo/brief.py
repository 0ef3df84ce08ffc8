"""Score answers by their length: best are twelve words that end as a sentence does."""


def twelve_words(completions, **columns):
    """Return a number from 0 to 1 for each answer."""
    return [score(answer[-1]["content"]) for answer in completions]


def score(text):
    """Return 1 for twelve words, less for more and for fewer, 0 for a text that does not end as a sentence does."""
    if not text.rstrip().endswith((".", "!", "?")):
        return 0.0
    return max(0.0, 1.0 - abs(len(text.split()) - 12) / 12)
