"""A shop's price list as a tool, and the reward of an answer that uses it."""

ITEMS = ["lamp", "chair", "table", "kettle", "pillow", "carpet", "mirror", "clock", "basket", "candle"]
ITEMS += ["bottle", "blanket", "shelf", "stool", "vase", "broom", "bucket", "hammer", "ladder", "brush"]
PRICES = {item: 11 + 7 * number for number, item in enumerate(ITEMS)}


def price(item: str) -> str:
    """Look up the price of an item of the shop.

    Args:
        item: One item, in one word.
    """
    return f"A {item} costs {PRICES[item]} dollars."


def helped(completions, item, **columns):
    """Return 1.0 for an answer that tells the right price, and less for a call on the way there."""
    (messages,), (item,) = completions, item
    last = messages[-1]
    calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
    if last["role"] == "assistant" and str(PRICES[item]) in last["content"]:
        return [1.0]
    if any(call["arguments"].get("item") == item for call in calls):
        return [0.5]
    return [0.2 if calls else 0.0]
