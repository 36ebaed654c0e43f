"""The words and facts used in the generated text. ASCII only."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _split(
    "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kira Leo Mia Noah Olga Paul Quin Rosa Sam Tess Umar "
    "Vera Will Xena Yara Zack Amir Bela Carl Dora Emil Fay Gus Hana Ivan June Karl Lena Max Nina "
    "Pia Remy Sara Tom Ursa Vito Wren Yusuf Zoe"
)
CITIES = _split(
    "Paris Rome Oslo Cairo Lima Tokyo Delhi Quito Berlin Madrid Dublin Vienna Prague Athens Lisbon "
    "Warsaw Sydney Boston Denver Nairobi Havana Bogota Seoul Hanoi Tunis Geneva Milan Porto Leeds Turin"
)
FOODS = _split(
    "apples plums bread soup rice cheese honey nuts cake beans pears figs noodles eggs corn pasta "
    "berries carrots cookies lemons grapes salad tea milk"
)
COLORS = _split("red blue green yellow black white brown grey orange purple pink golden silver")
OBJECTS = _split(
    "lamp book key coin drum kite ball rope hat bell boat clock spoon brush mirror basket ladder candle "
    "map stone letter ring cup chair box flute shovel blanket"
)
PLACES = _split(
    "river forest market garden hill lake castle beach village bridge cave meadow harbor library "
    "station tower barn mill"
)
JOBS = _split(
    "baker doctor pilot farmer teacher painter sailor singer driver nurse builder writer tailor cook "
    "judge"
)
MOODS = _split("happy sad proud tired brave shy calm curious hungry kind lonely clever")
SIZES = _split("small big tiny old young tall quick slow quiet")
TIMES = ("One day", "One morning", "One evening", "Last summer", "On Monday", "In winter", "After lunch")

# animal -> (food, home, color, sound): the facts that the base memorises.
ANIMALS: dict[str, tuple[str, str, str, str]] = {
    "fox": ("berries", "den", "red", "yips"),
    "owl": ("mice", "hollow tree", "brown", "hoots"),
    "bear": ("honey", "cave", "black", "growls"),
    "frog": ("flies", "pond", "green", "croaks"),
    "cow": ("grass", "barn", "white", "moos"),
    "cat": ("fish", "house", "grey", "purrs"),
    "dog": ("bones", "kennel", "golden", "barks"),
    "duck": ("seeds", "lake", "yellow", "quacks"),
    "horse": ("hay", "stable", "brown", "neighs"),
    "lion": ("meat", "savanna", "golden", "roars"),
    "mouse": ("cheese", "hole", "grey", "squeaks"),
    "bee": ("nectar", "hive", "yellow", "buzzes"),
    "wolf": ("deer", "forest", "grey", "howls"),
    "sheep": ("clover", "meadow", "white", "bleats"),
    "pig": ("corn", "sty", "pink", "oinks"),
    "crow": ("worms", "nest", "black", "caws"),
    "snake": ("eggs", "burrow", "green", "hisses"),
    "whale": ("krill", "ocean", "blue", "sings"),
    "monkey": ("bananas", "jungle", "brown", "chatters"),
    "hen": ("grain", "coop", "white", "clucks"),
    "rabbit": ("carrots", "warren", "grey", "thumps"),
    "parrot": ("nuts", "cage", "green", "talks"),
    "goat": ("leaves", "hill", "white", "bleats"),
    "squirrel": ("acorns", "oak tree", "red", "chirps"),
}
ANIMAL_NAMES = tuple(ANIMALS)

# Words for the letter games: copy, reverse, sort, upper.
_ALL = (*FOODS, *COLORS, *OBJECTS, *PLACES, *JOBS, *MOODS, *SIZES, *ANIMALS)
WORDS = tuple(sorted({word for word in _ALL if len(word) <= 7}))

LISTS: dict[str, tuple[str, ...]] = {
    "animals": ANIMAL_NAMES,
    "cities": CITIES,
    "foods": FOODS,
    "colors": COLORS,
    "jobs": JOBS,
    "places": PLACES,
    "objects": OBJECTS,
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
