"""The prompts of `rayk quickstart --model`: short requests to a chat model, about things of daily life.

A prompt is one of `REQUESTS` about one of `THINGS`. All prompts about a thing are in the same split, so the evaluation
asks about things that training never mentions.
"""

import random
from typing import Literal

Split = Literal["train", "evaluation"]

REQUESTS = (
    "Write one sentence about {}.", "Why do people like {}? Answer in one sentence.",
    "Describe {} to a child in one sentence.",
)  # fmt: skip
EVALUATION_THINGS = 24
THINGS = (
    "apples", "bananas", "bread", "butter", "cake", "carrots", "cheese", "cherries", "chocolate", "coffee", "cookies",
    "eggs", "fish", "garlic", "grapes", "honey", "ice cream", "jam", "lemons", "milk", "mushrooms", "noodles", "nuts",
    "oats", "olives", "onions", "oranges", "pancakes", "pasta", "peaches", "pears", "pepper", "pizza", "popcorn",
    "potatoes", "pumpkins", "rice", "salad", "salt", "soup", "spinach", "strawberries", "sugar", "tea", "tomatoes",
    "yogurt", "ants", "bears", "bees", "butterflies", "camels", "cats", "chickens", "cows", "dogs", "dolphins",
    "ducks", "eagles", "elephants", "foxes", "frogs", "giraffes", "goats", "horses", "kangaroos", "lions", "monkeys",
    "owls", "parrots", "penguins", "pigs", "rabbits", "sharks", "sheep", "snakes", "spiders", "squirrels", "swans",
    "tigers", "turtles", "whales", "wolves", "zebras", "beaches", "caves", "clouds", "deserts", "fields", "fire",
    "flowers", "fog", "forests", "gardens", "glaciers", "grass", "hills", "islands", "lakes", "leaves", "lightning",
    "mountains", "mud", "oceans", "rain", "rainbows", "rivers", "rocks", "sand", "snow", "stars", "storms",
    "the moon", "the sun", "thunder", "trees", "valleys", "volcanoes", "waterfalls", "waves", "wind", "bakeries",
    "bridges", "castles", "cinemas", "farms", "harbors", "hospitals", "hotels", "kitchens", "libraries", "lighthouses",
    "markets", "museums", "parks", "playgrounds", "restaurants", "schools", "stadiums", "supermarkets", "theaters",
    "train stations", "zoos", "airplanes", "bicycles", "boats", "buses", "cars", "helicopters", "motorcycles",
    "rockets", "scooters", "ships", "submarines", "trains", "trucks", "backpacks", "balloons", "beds", "blankets",
    "books", "boots", "bottles", "boxes", "brushes", "candles", "chairs", "clocks", "coats", "coins", "combs",
    "cups", "diaries", "doors", "forks", "glasses", "gloves", "hammers", "hats", "jackets", "keys", "knives",
    "ladders", "lamps", "letters", "maps", "mirrors", "nails", "needles", "newspapers", "notebooks", "ovens",
    "pencils", "phones", "photographs", "pillows", "plates", "postcards", "radios", "ropes", "scarves", "scissors",
    "shoes", "soap", "socks", "spoons", "stamps", "tables", "telescopes", "tents", "toothbrushes", "toys", "umbrellas",
    "vases", "wallets", "watches", "windows", "baseball", "basketball", "boxing", "camping", "chess", "climbing",
    "cooking", "cycling", "dancing", "drawing", "fishing", "football", "gardening", "golf", "hiking", "jogging",
    "juggling", "knitting", "painting", "photography", "poetry", "reading", "rowing", "sailing", "sewing", "singing",
    "skating", "skiing", "sleeping", "storytelling", "surfing", "swimming", "tennis", "traveling", "volleyball",
    "walking", "yoga", "drums", "flutes", "guitars", "harps", "pianos", "trumpets", "violins", "autumn", "birthdays",
    "carnivals", "holidays", "mornings", "parades", "picnics", "spring", "summer", "sunsets", "weddings", "weekends",
    "winter", "carpenters", "dentists", "doctors", "farmers", "firefighters", "gardeners", "musicians", "nurses",
    "painters", "pilots", "plumbers", "sailors", "scientists", "tailors", "teachers", "waiters",
)  # fmt: skip


def prompts(split: Split) -> list[str]:
    """Return the prompts of a split, in a fixed order."""
    draw = random.Random(0)
    things = draw.sample(THINGS, len(THINGS))
    if split == "evaluation":
        chosen = things[:EVALUATION_THINGS]
        return [REQUESTS[index % len(REQUESTS)].format(thing) for index, thing in enumerate(chosen)]
    found = [request.format(thing) for thing in things[EVALUATION_THINGS:] for request in REQUESTS]
    return draw.sample(found, len(found))
