"""Sixteen multiple-choice items of our own, in HellaSwag's shape, for work without any data.

They are written for this kit: no part of HellaSwag, no benchmark, and far too few to rank models
with. They show how likelihood scoring works where HellaSwag itself is not at hand.
"""

from __future__ import annotations

from lora_kit.data import Dataset

# (activity, what happens, then who, the four endings, the index of the right one)
_ITEMS = (
    (
        "Making tea",
        "A woman fills a kettle and sets it on the stove. When the water boils, she",
        (
            "pours it over the tea leaves in the pot.",
            "paints the kettle blue and hangs it on the wall.",
            "reads the stove a story until it falls asleep.",
            "throws the cups out of the window one by one.",
        ),
        0,
    ),
    (
        "Changing a tyre",
        "A man jacks up his car and takes off the flat tyre. Then he",
        (
            "eats it.",
            "puts the spare wheel on and tightens the nuts.",
            "asks the tyre how it feels about the weather today.",
            "drives away on three wheels while the jack is still in place.",
        ),
        1,
    ),
    (
        "Washing hands",
        "The boy turns on the tap and rubs soap between his fingers. He",
        (
            "puts the soap in his lunch box and closes it.",
            "turns off the light and plants a tree in the sink.",
            "rinses the foam away and dries his hands on a towel.",
            "sings to the fish.",
        ),
        2,
    ),
    (
        "Posting a letter",
        "She folds the letter, slides it into an envelope and writes the address. Next she",
        (
            "boils the envelope for ten minutes and adds a pinch of salt.",
            "throws the pen at a passing train.",
            "folds the table.",
            "sticks a stamp on it and drops it into the post box.",
        ),
        3,
    ),
    (
        "Baking bread",
        "The baker kneads the dough and leaves it in a warm place for an hour. The dough",
        (
            "rises to twice its size.",
            "learns to play the violin and leaves for the city.",
            "freezes into a solid block of ice.",
            "is driven to school by its parents every morning.",
        ),
        0,
    ),
    (
        "Walking the dog",
        "A girl clips the lead to her dog's collar and opens the front door. The dog",
        (
            "unlocks the car and drives to the office.",
            "runs outside and pulls her towards the park.",
            "pays the rent.",
            "folds the newspaper and asks for a cup of coffee.",
        ),
        1,
    ),
    (
        "Playing football",
        "The striker runs past two defenders and kicks the ball hard at the goal. The goalkeeper",
        (
            "orders a large pizza with extra cheese for the crowd.",
            "sits down on the grass and begins to knit a long scarf.",
            "dives to his left and pushes the ball over the bar.",
            "melts.",
        ),
        2,
    ),
    (
        "Cutting hair",
        "The hairdresser wets the man's hair and combs it straight. She",
        (
            "glues the comb to the mirror and calls the police.",
            "waters the chair until small green leaves appear.",
            "sells the man to a museum.",
            "takes her scissors and trims the ends.",
        ),
        3,
    ),
    (
        "Lighting a campfire",
        "They pile dry twigs in a ring of stones and strike a match. Soon the twigs",
        (
            "catch fire and begin to crackle.",
            "fill with water and float away down the street.",
            "vote.",
            "turn into a flock of birds and ask for directions.",
        ),
        0,
    ),
    (
        "Using a library",
        "The student finds the book she needs and carries it to the desk. The librarian",
        (
            "peels the book and slices it into a bowl of soup.",
            "stamps it and tells her when to bring it back.",
            "buries the desk in the garden behind the house.",
            "swims across.",
        ),
        1,
    ),
    (
        "Watering plants",
        "The leaves of the plant hang down and the soil is dry. He",
        (
            "buys the plant a pair of shoes and a warm winter coat.",
            "laughs at the ceiling.",
            "fills a can with water and pours it slowly onto the soil.",
            "unscrews the soil and posts it to his brother abroad.",
        ),
        2,
    ),
    (
        "Catching a bus",
        "She sees the bus coming and raises her hand. The bus",
        (
            "writes a poem about the sea and reads it aloud.",
            "lays an egg.",
            "climbs the nearest tree and refuses to come down.",
            "slows down and stops in front of her.",
        ),
        3,
    ),
    (
        "Brushing teeth",
        "The child squeezes toothpaste onto the brush and brushes for two minutes. Then she",
        (
            "rinses her mouth with water and spits into the sink.",
            "brushes the cat, the curtains and the kitchen floor.",
            "marries the brush.",
            "pours petrol into the bath and starts the engine.",
        ),
        0,
    ),
    (
        "Painting a wall",
        "The painter covers the floor with old sheets and opens a tin of white paint. He",
        (
            "drinks the tin to the bottom and asks for another.",
            "dips a roller into the paint and rolls it up the wall.",
            "arrests the ladder.",
            "teaches the sheets to dance before the guests arrive.",
        ),
        1,
    ),
    (
        "Fishing",
        "The old man sits on the bank with his rod. Suddenly the float goes under, and he",
        (
            "peels an orange and gives it to the river as a present.",
            "paints his boots with honey and waits for the train.",
            "lifts the rod and winds in the line.",
            "forgets the number seven.",
        ),
        2,
    ),
    (
        "Buying fruit",
        "A customer chooses six apples at the market and hands them to the seller. The seller",
        (
            "puts the customer on a shelf between the pears and the plums.",
            "whistles at the moon until it turns into a large cheese.",
            "sneezes in French.",
            "weighs the apples and tells her the price.",
        ),
        3,
    ),
)


def everyday_items() -> Dataset:
    """The items as rows with HellaSwag's fields, to be scored under HellaSwag's definition."""
    rows = tuple(
        {
            "ind": i,
            "activity_label": activity,
            "ctx_a": context,
            "ctx_b": "",
            "ctx": context,
            "endings": list(endings),
            "label": str(right),
        }
        for i, (activity, context, endings, right) in enumerate(_ITEMS)
    )
    return Dataset("everyday", "validation", rows, "lora_kit", "1")
