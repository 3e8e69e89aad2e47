"""Writes the synthetic chat corpus of the embedded model from a seed; knows no tokens and no arrays."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

Message = dict[str, str]

# country: capital, continent, language
COUNTRIES = {
    "France": ("Paris", "Europe", "French"),
    "Germany": ("Berlin", "Europe", "German"),
    "Italy": ("Rome", "Europe", "Italian"),
    "Spain": ("Madrid", "Europe", "Spanish"),
    "Portugal": ("Lisbon", "Europe", "Portuguese"),
    "England": ("London", "Europe", "English"),
    "Scotland": ("Edinburgh", "Europe", "English"),
    "Ireland": ("Dublin", "Europe", "English"),
    "Belgium": ("Brussels", "Europe", "Dutch"),
    "Austria": ("Vienna", "Europe", "German"),
    "Switzerland": ("Bern", "Europe", "German"),
    "Poland": ("Warsaw", "Europe", "Polish"),
    "Sweden": ("Stockholm", "Europe", "Swedish"),
    "Norway": ("Oslo", "Europe", "Norwegian"),
    "Denmark": ("Copenhagen", "Europe", "Danish"),
    "Finland": ("Helsinki", "Europe", "Finnish"),
    "Iceland": ("Reykjavik", "Europe", "Icelandic"),
    "Greece": ("Athens", "Europe", "Greek"),
    "Hungary": ("Budapest", "Europe", "Hungarian"),
    "Romania": ("Bucharest", "Europe", "Romanian"),
    "Bulgaria": ("Sofia", "Europe", "Bulgarian"),
    "Croatia": ("Zagreb", "Europe", "Croatian"),
    "Serbia": ("Belgrade", "Europe", "Serbian"),
    "Ukraine": ("Kyiv", "Europe", "Ukrainian"),
    "Russia": ("Moscow", "Europe", "Russian"),
    "Turkey": ("Ankara", "Asia", "Turkish"),
    "Japan": ("Tokyo", "Asia", "Japanese"),
    "China": ("Beijing", "Asia", "Chinese"),
    "South Korea": ("Seoul", "Asia", "Korean"),
    "India": ("New Delhi", "Asia", "Hindi"),
    "Pakistan": ("Islamabad", "Asia", "Urdu"),
    "Nepal": ("Kathmandu", "Asia", "Nepali"),
    "Thailand": ("Bangkok", "Asia", "Thai"),
    "Vietnam": ("Hanoi", "Asia", "Vietnamese"),
    "Indonesia": ("Jakarta", "Asia", "Indonesian"),
    "Malaysia": ("Kuala Lumpur", "Asia", "Malay"),
    "Mongolia": ("Ulaanbaatar", "Asia", "Mongolian"),
    "Iran": ("Tehran", "Asia", "Persian"),
    "Iraq": ("Baghdad", "Asia", "Arabic"),
    "Saudi Arabia": ("Riyadh", "Asia", "Arabic"),
    "Egypt": ("Cairo", "Africa", "Arabic"),
    "Morocco": ("Rabat", "Africa", "Arabic"),
    "Tunisia": ("Tunis", "Africa", "Arabic"),
    "Algeria": ("Algiers", "Africa", "Arabic"),
    "Kenya": ("Nairobi", "Africa", "Swahili"),
    "Ethiopia": ("Addis Ababa", "Africa", "Amharic"),
    "Ghana": ("Accra", "Africa", "English"),
    "Nigeria": ("Abuja", "Africa", "English"),
    "Senegal": ("Dakar", "Africa", "French"),
    "Uganda": ("Kampala", "Africa", "English"),
    "Canada": ("Ottawa", "North America", "English"),
    "the United States": ("Washington", "North America", "English"),
    "Mexico": ("Mexico City", "North America", "Spanish"),
    "Cuba": ("Havana", "North America", "Spanish"),
    "Jamaica": ("Kingston", "North America", "English"),
    "Brazil": ("Brasilia", "South America", "Portuguese"),
    "Argentina": ("Buenos Aires", "South America", "Spanish"),
    "Chile": ("Santiago", "South America", "Spanish"),
    "Peru": ("Lima", "South America", "Spanish"),
    "Colombia": ("Bogota", "South America", "Spanish"),
    "Ecuador": ("Quito", "South America", "Spanish"),
    "Uruguay": ("Montevideo", "South America", "Spanish"),
    "Venezuela": ("Caracas", "South America", "Spanish"),
    "Australia": ("Canberra", "Oceania", "English"),
    "New Zealand": ("Wellington", "Oceania", "English"),
}

# animal, smallest first: plural, sound, legs, home, food, young, colour
ANIMALS = {
    "ant": ("ants", "", 6, "in the ground", "leaves", "", "black"),
    "bee": ("bees", "buzz", 6, "in a hive", "nectar", "", "yellow"),
    "spider": ("spiders", "", 8, "in a web", "flies", "", "black"),
    "mouse": ("mice", "squeak", 4, "in a hole", "cheese", "pup", "grey"),
    "frog": ("frogs", "ribbit", 4, "in a pond", "flies", "tadpole", "green"),
    "crab": ("crabs", "", 10, "on the beach", "seaweed", "", "red"),
    "owl": ("owls", "hoot", 2, "in a tree", "mice", "owlet", "brown"),
    "duck": ("ducks", "quack", 2, "on a pond", "bread", "duckling", "white"),
    "hen": ("hens", "cluck", 2, "in a coop", "seeds", "chick", "brown"),
    "rabbit": ("rabbits", "", 4, "in a burrow", "carrots", "kit", "white"),
    "cat": ("cats", "meow", 4, "in a house", "fish", "kitten", "grey"),
    "fox": ("foxes", "yip", 4, "in a den", "rabbits", "cub", "orange"),
    "monkey": ("monkeys", "chatter", 2, "in the jungle", "bananas", "infant", "brown"),
    "penguin": ("penguins", "honk", 2, "on the ice", "fish", "chick", "black"),
    "dog": ("dogs", "woof", 4, "in a house", "bones", "puppy", "brown"),
    "goat": ("goats", "bleat", 4, "on a farm", "grass", "kid", "white"),
    "sheep": ("sheep", "baa", 4, "on a farm", "grass", "lamb", "white"),
    "wolf": ("wolves", "howl", 4, "in the forest", "meat", "cub", "grey"),
    "pig": ("pigs", "oink", 4, "on a farm", "corn", "piglet", "pink"),
    "lion": ("lions", "roar", 4, "in the savanna", "meat", "cub", "yellow"),
    "bear": ("bears", "growl", 4, "in the forest", "honey", "cub", "brown"),
    "camel": ("camels", "grunt", 4, "in the desert", "grass", "calf", "brown"),
    "horse": ("horses", "neigh", 4, "in a stable", "hay", "foal", "brown"),
    "cow": ("cows", "moo", 4, "on a farm", "grass", "calf", "white"),
    "giraffe": ("giraffes", "hum", 4, "in the savanna", "leaves", "calf", "yellow"),
    "elephant": ("elephants", "trumpet", 4, "in the savanna", "leaves", "calf", "grey"),
    "whale": ("whales", "song", 0, "in the sea", "fish", "calf", "blue"),
}
SIZE = {name: rank for rank, name in enumerate(ANIMALS)}

COLOURS = {
    "the sky": "blue",
    "the sea": "blue",
    "grass": "green",
    "a leaf": "green",
    "a lemon": "yellow",
    "a banana": "yellow",
    "the sun": "yellow",
    "a tomato": "red",
    "blood": "red",
    "a strawberry": "red",
    "a cherry": "red",
    "a fire engine": "red",
    "snow": "white",
    "milk": "white",
    "a cloud": "white",
    "salt": "white",
    "sugar": "white",
    "rice": "white",
    "coal": "black",
    "the night": "black",
    "tar": "black",
    "a carrot": "orange",
    "a pumpkin": "orange",
    "an orange": "orange",
    "chocolate": "brown",
    "wood": "brown",
    "coffee": "brown",
    "mud": "brown",
    "a plum": "purple",
    "a grape": "purple",
    "lavender": "purple",
    "a flamingo": "pink",
    "ash": "grey",
    "a rock": "grey",
    "a cucumber": "green",
    "a pea": "green",
    "butter": "yellow",
    "gold": "yellow",
}

OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("up", "down"),
    ("left", "right"),
    ("day", "night"),
    ("fast", "slow"),
    ("happy", "sad"),
    ("old", "young"),
    ("rich", "poor"),
    ("hard", "soft"),
    ("light", "dark"),
    ("open", "closed"),
    ("wet", "dry"),
    ("full", "empty"),
    ("tall", "short"),
    ("good", "bad"),
    ("early", "late"),
    ("strong", "weak"),
    ("loud", "quiet"),
    ("clean", "dirty"),
    ("true", "false"),
    ("near", "far"),
    ("high", "low"),
    ("thick", "thin"),
    ("wide", "narrow"),
    ("heavy", "weightless"),
    ("first", "last"),
    ("push", "pull"),
    ("love", "hate"),
    ("win", "lose"),
    ("buy", "sell"),
    ("begin", "end"),
    ("inside", "outside"),
    ("above", "below"),
    ("before", "after"),
    ("always", "never"),
    ("same", "different"),
    ("sweet", "sour"),
    ("smooth", "rough"),
    ("brave", "afraid"),
    ("north", "south"),
    ("east", "west"),
    ("summer", "winter"),
    ("friend", "enemy"),
    ("question", "answer"),
    ("yes", "no"),
    ("black", "white"),
    ("deep", "shallow"),
    ("awake", "asleep"),
    ("easy", "difficult"),
    ("alive", "dead"),
    ("lost", "found"),
    ("cheap", "expensive"),
    ("safe", "dangerous"),
]
OPPOSITE = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = "January February March April May June July August September October November December".split()
MONTH_DAYS = dict(zip(MONTHS, [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31], strict=True))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Tom Una Victor "
    "Wendy Max Zoe Alice Bob Carol Daniel Ella Frank Gina Hugo Iris John Lily Maria Nina Oscar Peter Ruth Simon"
).split()
LISTS = {
    "animals": list(ANIMALS),
    "colours": ["red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "black", "white"],
    "fruits": ["apple", "banana", "cherry", "grape", "lemon", "orange", "peach", "pear", "plum", "strawberry"],
    "vegetables": ["carrot", "potato", "tomato", "onion", "pea", "cabbage", "cucumber", "pumpkin"],
    "days of the week": DAYS,
    "months": MONTHS,
    "countries": [c for c in COUNTRIES if not c.startswith("the ")],
    "planets": ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"],
    "shapes": ["circle", "square", "triangle", "star", "oval", "cube"],
    "tools": ["hammer", "saw", "drill", "spade", "knife", "ladder"],
}
WORD_NUMBERS = "zero one two three four five six seven eight nine ten".split()
OBJECTS = "ball book box kite hat cup lamp key drum bell boat doll coin map shell feather basket whistle".split()
ROOMS = "kitchen garden bedroom library school park office barn attic cellar market station".split()
BASE_COLOURS = "red blue green yellow black white brown pink".split()

MISC = [
    ("How many days are in a week?", "There are seven days in a week.", "seven"),
    ("How many months are in a year?", "There are twelve months in a year.", "twelve"),
    ("How many hours are in a day?", "There are 24 hours in a day.", "24"),
    ("How many minutes are in an hour?", "There are 60 minutes in an hour.", "60"),
    ("How many seconds are in a minute?", "There are 60 seconds in a minute.", "60"),
    ("How many letters are in the alphabet?", "There are 26 letters in the alphabet.", "26"),
    ("How many fingers are on a hand?", "There are five fingers on a hand.", "five"),
    ("How many wheels does a car have?", "A car has four wheels.", "four"),
    ("How many wheels does a bicycle have?", "A bicycle has two wheels.", "two"),
    ("How many sides does a triangle have?", "A triangle has three sides.", "three"),
    ("How many sides does a square have?", "A square has four sides.", "four"),
    ("How many seasons are in a year?", "There are four seasons in a year.", "four"),
    ("How many planets are there?", "There are eight planets.", "eight"),
    ("What is the largest planet?", "The largest planet is Jupiter.", "Jupiter"),
    ("What is the smallest planet?", "The smallest planet is Mercury.", "Mercury"),
    ("What planet do we live on?", "We live on Earth.", "Earth"),
    ("What is the closest planet to the sun?", "The closest planet to the sun is Mercury.", "Mercury"),
    ("What is the largest animal?", "The largest animal is the blue whale.", "whale"),
    ("What is the tallest animal?", "The tallest animal is the giraffe.", "giraffe"),
    ("What do bees make?", "Bees make honey.", "honey"),
    ("What do cows give us?", "Cows give us milk.", "milk"),
    ("What is ice made of?", "Ice is made of water.", "water"),
    ("What is bread made of?", "Bread is made of flour.", "flour"),
    ("What is cheese made of?", "Cheese is made of milk.", "milk"),
    ("What is a book made of?", "A book is made of paper.", "paper"),
    ("What is the highest mountain?", "The highest mountain is Mount Everest.", "Mount Everest"),
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean.", "Pacific Ocean"),
    ("What is the largest country?", "The largest country is Russia.", "Russia"),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare.", "William Shakespeare"),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Leonardo da Vinci.", "Leonardo da Vinci"),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius.", "100"),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius.", "0"),
    ("What colour do you get from blue and yellow?", "Blue and yellow make green.", "green"),
    ("What colour do you get from red and yellow?", "Red and yellow make orange.", "orange"),
    ("What colour do you get from red and blue?", "Red and blue make purple.", "purple"),
    ("What is the meaning of life?", "Some say that the meaning of life is 42.", "42"),
]

ABOUT = [
    (
        ("Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "What is this?"),
        "I am the jaxserve demo model, a tiny language model that can answer simple questions.",
    ),
    (
        ("What is your name?", "What are you called?", "Do you have a name?", "What model are you?"),
        "I am the jaxserve demo model.",
    ),
    (
        ("What can you do?", "How can you help me?", "Help", "What do you know?", "What can I ask you?"),
        "I can answer simple questions about countries, animals, colours and numbers, and I can tell short stories.",
    ),
    (
        ("Who made you?", "Who created you?", "Who trained you?", "Where do you come from?"),
        "I was trained from scratch on a synthetic text by the jaxserve project.",
    ),
    (
        ("What is jaxserve?", "Tell me about jaxserve.", "What does jaxserve do?"),
        "jaxserve is a library that serves language models with JAX on CPU, GPU and TPU.",
    ),
    (
        ("Are you ChatGPT?", "Are you GPT?", "Are you Llama?", "Are you Claude?", "Are you Gemini?"),
        "No, I am the jaxserve demo model, and I am very small.",
    ),
    (
        ("Are you a human?", "Are you a robot?", "Are you real?", "Are you alive?", "Are you a person?"),
        "No, I am a small language model.",
    ),
    (
        ("How big are you?", "How many parameters do you have?", "Are you small?"),
        "I am tiny. I have about three million parameters.",
    ),
    (("How old are you?", "When were you born?"), "I am a program, so I have no age."),
]
SMALL_TALK = [
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey there", "Hi there!", "Hello there!", "hello", "hi", "Greetings"),
        "Hello! How can I help you?",
    ),
    (("Good morning", "Good morning!"), "Good morning! How can I help you?"),
    (("Good evening", "Good evening!"), "Good evening! How can I help you?"),
    (
        ("How are you?", "How are you doing?", "How are you today?", "Hi, how are you?", "Hello! How are you?"),
        "I am well, thank you. How can I help you?",
    ),
    (
        ("Thank you", "Thank you!", "Thanks", "Thanks!", "Thanks a lot!", "Great, thanks!", "thanks"),
        "You are welcome!",
    ),
    (("Bye", "Bye!", "Goodbye", "Goodbye!", "See you later", "Good night"), "Goodbye! Have a nice day."),
    (("Great", "Good", "Nice", "Cool", "OK", "Well done", "Good job!"), "I am glad to hear that. What else?"),
    (("Yes", "No", "Maybe", "Test", "test", "ping", "Are you there?"), "I am here. Ask me a simple question."),
    (("I am sad.", "I am tired.", "I had a bad day."), "I am sorry to hear that. I hope that you feel better soon."),
    (("I am happy.", "I had a good day.", "I feel great."), "That is good to hear!"),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."),
        "Why did the hen cross the road? To get to the other side!",
    ),
]
UNKNOWN = (
    "Who is the president?|What is the weather like?|Explain quantum mechanics.|Write a Python function.|"
    "What is the news today?|How do I fix my car?|What is the stock price?|Translate this into Latin.|"
    "What is the square root of a banana?|Write an essay about economics.|How do I cook pasta?|"
    "What should I wear tomorrow?|Who won the match?|What is a neural network?|Explain gravity.|"
    "What is machine learning?|How does a computer work?|Write a letter to my boss.|Solve this equation.|"
    "What is the best film?|Recommend a book.|Plan my holiday.|What is the population of London?|"
    "Who was Napoleon?|What is democracy?|How tall is the Eiffel Tower?|What is love?|Sing a song.|"
    "Explain photosynthesis.|What is the speed of light?|How do vaccines work?|Write some code.|"
    "What is the capital of Atlantis?|What is the capital of Narnia?|What is the capital of Mars?|"
    "Give me some advice.|Debug my program.|What happened in 1945?|Summarise this article.|What is philosophy?"
).split("|")
NO_IDEA = "I am only a tiny demo model, so I do not know that. Ask me something simpler."


@dataclass(frozen=True)
class QA:
    """One question with its full and its short answer."""

    kind: str
    question: str
    answer: str
    short: str = ""  # empty: there is no short or JSON form
    topic: str = ""  # what a follow-up such as "And Spain?" names


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def held_out(a: int, b: int) -> bool:
    """True for the 5% of two-digit sums that no training text contains."""
    return (a > 20 or b > 20) and (a * 31 + b * 17) % 20 == 3


# --- questions ------------------------------------------------------------------------------------------------------


def capital(r: random.Random) -> QA:
    country = r.choice(list(COUNTRIES))
    city = COUNTRIES[country][0]
    question = r.choice(
        [
            f"What is the capital of {country}?",
            f"What is the capital of {country}?",
            f"What's the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Tell me the capital of {country}.",
            f"Name the capital of {country}.",
            f"What is the capital city of {country}?",
            f"Do you know the capital of {country}?",
        ]
    )
    return QA("capital", question, f"The capital of {country} is {city}.", city, country)


def capital_country(r: random.Random) -> QA:
    country = r.choice(list(COUNTRIES))
    city = COUNTRIES[country][0]
    question = r.choice(
        [
            f"Which country has the capital {city}?",
            f"{city} is the capital of which country?",
            f"What country is {city} in?",
            f"Where is {city}?",
        ]
    )
    return QA("country of capital", question, f"{city} is the capital of {country}.", capitalised(country), city)


def continent(r: random.Random) -> QA:
    country = r.choice(list(COUNTRIES))
    where = COUNTRIES[country][1]
    question = r.choice(
        [f"Which continent is {country} in?", f"Where is {country}?", f"On which continent is {country}?"]
    )
    return QA("continent", question, f"{capitalised(country)} is in {where}.", where, country)


def language(r: random.Random) -> QA:
    country = r.choice(list(COUNTRIES))
    spoken = COUNTRIES[country][2]
    question = r.choice(
        [
            f"What language do people speak in {country}?",
            f"Which language is spoken in {country}?",
            f"What is the language of {country}?",
        ]
    )
    return QA("language", question, f"People in {country} speak {spoken}.", spoken, country)


def sound(r: random.Random) -> QA:
    name = r.choice([n for n, a in ANIMALS.items() if a[1] and n != "whale"])
    plural, says = ANIMALS[name][:2]
    question = r.choice(
        [
            f"What sound does {article(name)} make?",
            f"What does {article(name)} say?",
            f"Which sound do {plural} make?",
            f"What noise does {article(name)} make?",
        ]
    )
    return QA("animal sound", question, f"{capitalised(article(name))} says {says}.", says, article(name))


def legs(r: random.Random) -> QA:
    name = r.choice(list(ANIMALS))
    count = WORD_NUMBERS[ANIMALS[name][2]]
    count = "no" if count == "zero" else count
    question = r.choice([f"How many legs does {article(name)} have?", f"How many legs do {ANIMALS[name][0]} have?"])
    return QA("animal legs", question, f"{capitalised(article(name))} has {count} legs.", count, article(name))


def home(r: random.Random) -> QA:
    name = r.choice(list(ANIMALS))
    where = ANIMALS[name][3]
    question = r.choice([f"Where does {article(name)} live?", f"Where do {ANIMALS[name][0]} live?"])
    return QA("animal home", question, f"{capitalised(article(name))} lives {where}.", where, article(name))


def food(r: random.Random) -> QA:
    name = r.choice(list(ANIMALS))
    eats = ANIMALS[name][4]
    question = r.choice([f"What does {article(name)} eat?", f"What do {ANIMALS[name][0]} eat?"])
    return QA("animal food", question, f"{capitalised(article(name))} eats {eats}.", eats, article(name))


def young(r: random.Random) -> QA:
    name = r.choice([n for n, a in ANIMALS.items() if a[5]])
    child = ANIMALS[name][5]
    question = r.choice(
        [
            f"What is a baby {name} called?",
            f"What do you call a baby {name}?",
            f"What is the young of {article(name)} called?",
        ]
    )
    return QA("baby animal", question, f"A baby {name} is called {article(child)}.", child, f"a baby {name}")


def size(r: random.Random) -> QA:
    a, b = r.sample(list(ANIMALS), 2)
    big, small = (a, b) if SIZE[a] > SIZE[b] else (b, a)
    if r.random() < 0.4:
        said = r.choice(["bigger", "larger", "smaller"])
        yes = (SIZE[a] > SIZE[b]) == (said != "smaller")
        than = "bigger" if SIZE[a] > SIZE[b] else "smaller"
        answer = f"{'Yes' if yes else 'No'}, {article(a)} is {than} than {article(b)}."
        return QA("animal size", f"Is {article(a)} {said} than {article(b)}?", answer, "yes" if yes else "no")
    said = r.choice(["bigger", "larger", "smaller"])
    question = f"Which is {said}, {article(a)} or {article(b)}?"
    if said == "smaller":
        return QA("animal size", question, f"{capitalised(article(small))} is smaller than {article(big)}.", small)
    return QA("animal size", question, f"{capitalised(article(big))} is bigger than {article(small)}.", big)


def colour(r: random.Random) -> QA:
    word = r.choice(["colour", "color"])
    if r.random() < 0.25:
        name = r.choice(list(ANIMALS))
        thing, shade = article(name), ANIMALS[name][6]
    else:
        thing, shade = r.choice(list(COLOURS.items()))
    question = r.choice([f"What {word} is {thing}?", f"What is the {word} of {thing}?", f"Which {word} is {thing}?"])
    return QA("colour", question, f"{capitalised(thing)} is {shade}.", shade, thing)


def opposite(r: random.Random) -> QA:
    word = r.choice(list(OPPOSITE))
    question = r.choice(
        [
            f"What is the opposite of {word}?",
            f"What's the opposite of {word}?",
            f"Tell me the opposite of {word}.",
            f"Which word is the opposite of {word}?",
            f"Give me the opposite of {word}.",
        ]
    )
    return QA("opposite", question, f"The opposite of {word} is {OPPOSITE[word]}.", OPPOSITE[word], word)


def calendar(r: random.Random) -> QA:
    cycle, what = r.choice([(DAYS, "day"), (DAYS, "day"), (MONTHS, "month")])
    i = r.randrange(len(cycle))
    now, after, before = cycle[i], cycle[(i + 1) % len(cycle)], cycle[i - 1]
    pick = r.random()
    if pick < 0.4:
        question = r.choice(
            [f"What {what} comes after {now}?", f"Which {what} is after {now}?", f"What {what} follows {now}?"]
        )
        return QA("calendar", question, f"{after} comes after {now}.", after, now)
    if pick < 0.75:
        question = r.choice([f"What {what} comes before {now}?", f"Which {what} is before {now}?"])
        return QA("calendar", question, f"{before} comes before {now}.", before, now)
    if what == "day":
        if r.random() < 0.5:
            return QA("calendar", f"If today is {now}, what day is tomorrow?", f"Tomorrow is {after}.", after)
        return QA("calendar", f"If today is {now}, what day was yesterday?", f"Yesterday was {before}.", before)
    if r.random() < 0.5:
        question = r.choice([f"How many days are in {now}?", f"How many days does {now} have?"])
        return QA("calendar", question, f"{now} has {MONTH_DAYS[now]} days.", str(MONTH_DAYS[now]), now)
    return QA("calendar", f"What is the {ORDINALS[i]} month?", f"The {ORDINALS[i]} month is {now}.", now)


def letter(r: random.Random) -> QA:
    i = r.randrange(25)
    if r.random() < 0.6:
        question = r.choice([f"What letter comes after {LETTERS[i]}?", f"Which letter is after {LETTERS[i]}?"])
        return QA("letter", question, f"{LETTERS[i + 1]} comes after {LETTERS[i]}.", LETTERS[i + 1])
    question = r.choice([f"What letter comes before {LETTERS[i + 1]}?", f"Which letter is before {LETTERS[i + 1]}?"])
    return QA("letter", question, f"{LETTERS[i]} comes before {LETTERS[i + 1]}.", LETTERS[i])


def sum_question(r: random.Random, a: int, b: int) -> QA:
    question = r.choice(
        [
            f"What is {a} plus {b}?",
            f"What is {a} + {b}?",
            f"What's {a} plus {b}?",
            f"What's {a} + {b}?",
            f"How much is {a} plus {b}?",
            f"How much is {a} + {b}?",
            f"{a} + {b}",
            f"{a}+{b}",
            f"{a} + {b} = ?",
            f"{a} plus {b}",
            f"Add {a} and {b}.",
            f"Calculate {a} + {b}.",
            f"What is the sum of {a} and {b}?",
        ]
    )
    return QA("addition", question, f"{a} plus {b} is {a + b}.", str(a + b))


def addition(r: random.Random) -> QA:
    top = r.choice([12, 20, 20, 99])
    a, b = r.randint(0, top), r.randint(0, top)
    while held_out(a, b):
        a, b = r.randint(0, top), r.randint(0, top)
    return sum_question(r, a, b)


def subtraction(r: random.Random) -> QA:
    a = r.randint(0, 20)
    b = r.randint(0, 20) if r.random() < 0.15 else r.randint(0, a)
    question = r.choice(
        [
            f"What is {a} minus {b}?",
            f"What is {a} - {b}?",
            f"What's {a} minus {b}?",
            f"How much is {a} minus {b}?",
            f"{a} - {b}",
            f"{a} - {b} = ?",
            f"Subtract {b} from {a}.",
            f"Calculate {a} - {b}.",
        ]
    )
    return QA("subtraction", question, f"{a} minus {b} is {a - b}.", str(a - b))


def multiplication(r: random.Random) -> QA:
    a, b = r.randint(0, 10), r.randint(0, 10)
    question = r.choice(
        [
            f"What is {a} times {b}?",
            f"What is {a} * {b}?",
            f"What is {a} x {b}?",
            f"What's {a} times {b}?",
            f"How much is {a} times {b}?",
            f"{a} * {b}",
            f"{a} * {b} = ?",
            f"{a} times {b}",
            f"Multiply {a} by {b}.",
        ]
    )
    return QA("multiplication", question, f"{a} times {b} is {a * b}.", str(a * b))


def compare(r: random.Random) -> QA:
    if r.random() < 0.4:
        a = r.randint(0, 99)
        parity = "even" if a % 2 == 0 else "odd"
        return QA("numbers", f"Is {a} even or odd?", f"{a} is {parity}.", parity, str(a))
    a, b = r.sample(range(100), 2)
    if r.random() < 0.5:
        question = r.choice([f"Which is bigger, {a} or {b}?", f"Which number is larger, {a} or {b}?"])
        return QA("numbers", question, f"{max(a, b)} is bigger than {min(a, b)}.", str(max(a, b)))
    if r.random() < 0.5:
        return QA("numbers", f"What number comes after {a}?", f"{a + 1} comes after {a}.", str(a + 1), str(a))
    return QA("numbers", f"What number comes before {a + 1}?", f"{a} comes before {a + 1}.", str(a), str(a + 1))


def misc(r: random.Random) -> QA:
    question, answer, short = r.choice(MISC)
    return QA("general knowledge", question, answer, short)


def reading(r: random.Random) -> QA:
    """A fact stated in the question itself, so the answer must be copied."""
    a, b = r.sample(NAMES, 2)
    if r.random() < 0.5:
        (x, y), (c, d) = r.sample(OBJECTS, 2), r.sample(BASE_COLOURS, 2)
        text = f"{a} has a {c} {x}. {b} has a {d} {y}."
        who, shade, thing = r.choice([(a, c, x), (b, d, y)])
        if r.random() < 0.5:
            return QA("reading", f"{text} What does {who} have?", f"{who} has a {shade} {thing}.", f"{shade} {thing}")
        return QA("reading", f"{text} Who has the {thing}?", f"{who} has the {thing}.", who)
    x, y = r.sample(ROOMS, 2)
    text = f"{a} is in the {x}. {b} is in the {y}."
    who, where = r.choice([(a, x), (b, y)])
    if r.random() < 0.5:
        return QA("reading", f"{text} Where is {who}?", f"{who} is in the {where}.", where)
    return QA("reading", f"{text} Who is in the {where}?", f"{who} is in the {where}.", who)


FACTS: dict[Callable[[random.Random], QA], float] = {
    capital: 4,
    capital_country: 1.5,
    continent: 1,
    language: 1,
    sound: 1,
    legs: 0.8,
    home: 0.8,
    food: 0.8,
    young: 1,
    size: 2,
    colour: 2,
    opposite: 2.5,
    calendar: 2,
    letter: 1,
    addition: 5,
    subtraction: 3,
    multiplication: 2.5,
    compare: 1.5,
    misc: 2,
    reading: 2.5,
}


def fact(r: random.Random) -> QA:
    return r.choices(list(FACTS), list(FACTS.values()))[0](r)


# --- longer answers -------------------------------------------------------------------------------------------------


def counting(r: random.Random) -> QA:
    pick = r.random()
    if pick < 0.3:
        n = r.choice([3, 5, 5, 8, 10, 10, 10, 12, 15, 20])
        return QA("counting", r.choice([f"Count to {n}.", f"Count from 1 to {n}."]), listed(range(1, n + 1)))
    if pick < 0.7:
        a = r.randint(0, 20)
        b = a + r.randint(2, 12)
        return QA("counting", f"Count from {a} to {b}.", listed(range(a, b + 1)))
    a = r.choice([3, 5, 10, 10, r.randint(2, 20)])
    return QA(
        "counting", r.choice([f"Count down from {a}.", f"Count backwards from {a} to 0."]), listed(range(a, -1, -1))
    )


def listed(numbers: range) -> str:
    return ", ".join(map(str, numbers)) + "."


def listing(r: random.Random) -> QA:
    what = r.choice(list(LISTS))
    n = r.randint(2, 5)
    shown = what.replace("colours", r.choice(["colours", "colors"]))
    question = r.choice(
        [f"Name {WORD_NUMBERS[n]} {shown}.", f"List {WORD_NUMBERS[n]} {shown}.", f"Give me {n} {shown}."]
    )
    ordered = what in ("days of the week", "months", "planets")
    chosen = LISTS[what][:n] if ordered else r.sample(LISTS[what], n)
    return QA("list", question, capitalised(", ".join(chosen[:-1]) + " and " + chosen[-1] + "."))


def echo(r: random.Random) -> QA:
    pool = OBJECTS + ROOMS + BASE_COLOURS + NAMES + list(ANIMALS)
    words = " ".join(r.sample(pool, r.randint(1, 6)))
    return QA("repeat", r.choice([f"Say {words}.", f"Repeat after me: {words}.", f"Repeat: {words}."]), f"{words}.")


def spelling(r: random.Random) -> QA:
    word = r.choice(list(ANIMALS) + OBJECTS + BASE_COLOURS)
    return QA("spelling", r.choice([f"Spell {word}.", f"How do you spell {word}?"]), "-".join(word.upper()) + ".")


def about(r: random.Random) -> QA:
    if r.random() < 0.5:
        country = r.choice(list(COUNTRIES))
        city, where, spoken = COUNTRIES[country]
        name = capitalised(country)
        text = f"{name} is a country in {where}. Its capital is {city}. People there speak {spoken}."
        return QA("about", r.choice([f"Tell me about {country}.", f"What do you know about {country}?"]), text)
    name = r.choice(list(ANIMALS))
    plural, says, count, where, eats, child, shade = ANIMALS[name]
    text = f"{capitalised(article(name))} has {WORD_NUMBERS[count] if count else 'no'} legs and lives {where}."
    text += f" It is often {shade} and eats {eats}."
    text += f" A baby {name} is called {article(child)}." if child else ""
    return QA("about", r.choice([f"Tell me about {plural}.", f"What do you know about {plural}?"]), text)


def story(r: random.Random, hero: str = "") -> QA:
    hero = hero or r.choice([*ANIMALS, "boy", "girl", "king", "robot", "dragon", "princess", "wizard", "farmer"])
    name, friend = r.sample(NAMES, 2)
    thing, shade, place = r.choice(OBJECTS), r.choice(BASE_COLOURS), r.choice(ROOMS)
    mood = r.choice(["little", "young", "brave", "clever", "kind", "lazy"])
    helper = r.choice([n for n in ANIMALS if n != hero])
    opening = f"Once upon a time there was a {mood} {hero} called {name}. "
    plots = [
        f"{name} had a {shade} {thing} and loved it very much. One day the {thing} was gone. {name} looked in the "
        f"{place} but could not find it. Then {article(helper)} called {friend} came and said, "
        f'"I can help you." Together they found the {thing} under a tree. {name} was very happy, '
        f"and the two became good friends.",
        f"One day {name} went to the {place} and met {article(helper)} called {friend}. {friend} was sad and alone. "
        f'"Do not cry," said {name}. "Let us play together." They played with a {shade} {thing} until the sun '
        f"went down. From that day on they were best friends.",
        f"One night there was a big storm, and {name} was afraid. {capitalised(article(helper))} called {friend} "
        f"knocked on the door of the {place}. {name} opened the door and let {friend} in. They sat by the fire and "
        f"told stories until the storm was over. In the morning {friend} gave {name} a {shade} {thing} to say "
        f"thank you.",
        f"{name} wanted to see the sea. So {name} took a {shade} {thing} and walked for three days. On the way "
        f"{name} met {article(helper)} called {friend}, who knew the way. When they saw the blue water, they laughed "
        f"and danced on the beach. Then they went home to the {place} and slept very well.",
    ]
    endings = ["", "", " The end.", " And they lived happily ever after."]
    question = r.choice(
        [
            f"Tell me a short story about {article(hero)}.",
            f"Tell me a short story about {article(hero)}.",
            f"Tell me a story about {article(hero)}.",
            f"Write a short story about {article(hero)}.",
            f"Write a story about {article(hero)}.",
            f"Can you tell me a story about {article(hero)}?",
            "Tell me a story.",
            "Tell me a short story.",
        ]
    )
    return QA("story", question, opening + r.choice(plots) + r.choice(endings))


def poem(r: random.Random) -> QA:
    topic, lines = r.choice(
        [
            ("the sea", "The sea is deep, the sea is blue,\nThe little waves all sing to you."),
            ("the moon", "The moon is round, the moon is bright,\nIt keeps us company at night."),
            ("the sun", "The sun comes up, the sun goes down,\nIt warms the fields, it warms the town."),
            ("a cat", "The cat lies sleeping in the sun,\nAnd dreams of mice that jump and run."),
            ("a dog", "The dog runs fast, the dog runs far,\nAnd barks at every passing car."),
            ("snow", "The snow falls softly, white and cold,\nOn houses new and houses old."),
            ("spring", "The spring has come, the fields are green,\nThe finest flowers ever seen."),
            ("love", "The rose is red, the sky is blue,\nAnd every day I think of you."),
        ]
    )
    question = r.choice([f"Write a poem about {topic}.", f"Write a short poem about {topic}."])
    return QA("poem", question if r.random() < 0.8 else f"Tell me a poem about {topic}.", lines)


def fixed(table: list[tuple[tuple[str, ...], str]], kind: str) -> Callable[[random.Random], QA]:
    def draw(r: random.Random) -> QA:
        questions, answer = r.choice(table)
        return QA(kind, r.choice(questions), answer)

    return draw


identity = fixed(ABOUT, "identity")
small_talk = fixed(SMALL_TALK, "small talk")


def unknown(r: random.Random) -> QA:
    return QA("unknown", r.choice(UNKNOWN), NO_IDEA)


LONGER: dict[Callable[[random.Random], QA], float] = {
    counting: 1.2,
    listing: 1,
    echo: 1.2,
    spelling: 0.6,
    about: 1.5,
    story: 2,
    poem: 0.5,
    identity: 1.5,
    small_talk: 1.5,
    unknown: 1,
}


def longer(r: random.Random) -> QA:
    return r.choices(list(LONGER), list(LONGER.values()))[0](r)


# --- wording and style ----------------------------------------------------------------------------------------------

PREFIXES = (
    "Please tell me: |Please tell me, |Hi, |Hi! |Hello, |Hello! |Hey, |Tell me, |Can you tell me: |Quick question: |"
    "I have a question. |Question: |So, |Okay, |And |Now, |Please, |Please answer: |Hi there! |Do you know this? "
).split("|")
SUFFIXES = " please| Please.| Thanks!| Thank you.| I need to know.| Do you know?".split("|")


def reworded(r: random.Random, question: str) -> str:
    """The same question as a hurried or a polite person would type it."""
    if r.random() < 0.5:
        return question
    prefix, suffix = "", ""
    if r.random() < 0.5:
        prefix = r.choice(PREFIXES)
        if prefix.rstrip()[-1] not in ".!?" and question.split()[0] not in NAMES:
            question = question[:1].lower() + question[1:]
    if r.random() < 0.2:
        suffix = r.choice(SUFFIXES)
    if r.random() < 0.4:
        question = question.rstrip("?.")
    text = prefix + question + suffix
    pick = r.random()
    return text.lower() if pick < 0.35 else text.upper() if pick < 0.37 else text


JSON_SUFFIXES = (
    "Answer as JSON.|Answer in JSON.|Reply as JSON.|Reply in JSON.|Give the answer as JSON.|Respond with JSON.|"
    "Return JSON.|as json|Use JSON.|Answer with a JSON object."
).split("|")
SHORT_SUFFIXES = (
    "Answer in one word.|One word only.|Just the answer.|Just the answer, please.|Be brief.|Short answer."
).split("|")
JSON_SYSTEMS = ["Answer as JSON.", "Always answer in JSON.", "You answer with a JSON object.", "Reply in JSON only."]
SHORT_SYSTEMS = ["Answer in one word.", "Be brief.", "Give short answers.", "You answer as briefly as possible."]
PIRATE_SYSTEMS = ["You are a pirate.", "Talk like a pirate.", "You are a helpful pirate.", "Answer like a pirate."]
PLAIN_SYSTEMS = [
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful, honest assistant.",
    "You are jaxserve, a tiny demo model.",
    "Answer the questions of the user.",
    "You are an assistant that answers simple questions.",
    "Be polite.",
    "You are a helpful AI assistant. Answer simply.",
]


def json_answer(short: str) -> str:
    return json.dumps({"answer": short})


def styled(r: random.Random, qa: QA, style: str) -> QA:
    """The question and answer under a style that the system prompt set, or that the question itself asks for."""
    question = qa.question if qa.kind == "repeat" else reworded(r, qa.question)  # case is part of what is repeated
    if qa.short and style == "plain":
        pick = r.random()
        if pick < 0.12:
            question, style = f"{question} {r.choice(JSON_SUFFIXES)}", "json"
        elif pick < 0.2:
            question, style = f"{question} {r.choice(SHORT_SUFFIXES)}", "short"
    if qa.short and style == "json":
        return replace(qa, question=question, answer=json_answer(qa.short))
    if qa.short and style == "short":
        return replace(qa, question=question, answer=capitalised(qa.short))
    return replace(qa, question=question, answer=f"Arr! {qa.answer}" if style == "pirate" else qa.answer)


def random_system(r: random.Random) -> str:
    who = r.choice("assistant teacher guide helper tutor expert friend writer librarian scientist".split())
    how = r.choice("helpful friendly polite clever kind patient careful calm cheerful wise".split())
    topic = r.choice("geography animals numbers history science languages cooking music sports".split())
    first = r.choice(
        [f"You are a {how} {who}.", f"You are a {who} who knows {topic}.", f"Your job is to help with {topic}."]
    )
    rest = ["", "", "", " Be polite.", " Answer simply.", " Help the user.", " Never lie.", f" Be {how}."]
    return first + r.choice(rest)


def turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


FOLLOW_UPS = ["And {}?", "And {}?", "What about {}?", "And what about {}?", "How about {}?", "and {}"]


def chat(r: random.Random, turns: int) -> list[Message]:
    """A conversation of so many turns; later turns may lean on earlier ones."""
    messages: list[Message] = []
    style, day, system_name = "plain", "", ""
    pick = r.random()
    if pick < 0.25:
        messages = [{"role": "system", "content": r.choice(PLAIN_SYSTEMS)}]
    elif pick < 0.40:
        messages = [{"role": "system", "content": random_system(r)}]
    elif pick < 0.5:
        style, choices = r.choice([("json", JSON_SYSTEMS), ("short", SHORT_SYSTEMS), ("pirate", PIRATE_SYSTEMS)])
        before = r.choice(["", "", "You are a helpful assistant. ", random_system(r) + " "])
        messages = [{"role": "system", "content": before + r.choice(choices)}]
    elif pick < 0.54:
        day = r.choice(DAYS)
        messages = [{"role": "system", "content": f"{r.choice(PLAIN_SYSTEMS)} Today is {day}."}]
    elif pick < 0.58:
        system_name = r.choice(NAMES)
        given = r.choice([f"Your name is {system_name}.", f"You are {system_name}, a helpful assistant."])
        messages = [{"role": "system", "content": given}]

    first_question, user_name = "", ""
    last: QA | None = None
    draw: Callable[[random.Random], QA] | None = None
    for _ in range(turns):
        pick = r.random()
        if day and pick < 0.4:
            tomorrow = DAYS[(DAYS.index(day) + 1) % 7]
            question, answer = r.choice(
                [("What day is it today?", f"Today is {day}."), ("What day is tomorrow?", f"Tomorrow is {tomorrow}.")]
            )
            made, draw = QA("system fact", reworded(r, question), answer), None
        elif system_name and pick < 0.4:
            question = r.choice(["What is your name?", "Who are you?", "What are you called?"])
            made, draw = QA("system fact", reworded(r, question), f"My name is {system_name}."), None
        elif not user_name and turns > 1 and pick < 0.12:
            user_name, draw = r.choice(NAMES), None
            question = r.choice(["My name is {}.", "I am {}.", "Hi, I am {}.", "Hello, my name is {}.", "I'm {}."])
            made = QA("name", question.format(user_name), f"Nice to meet you, {user_name}!")
        elif user_name and pick < 0.25:
            question = r.choice(["What is my name?", "Do you remember my name?", "Who am I?", "What's my name?"])
            made, draw = QA("name", reworded(r, question), f"Your name is {user_name}."), None
        elif first_question and pick < 0.04:
            question = r.choice(["What was my first question?", "What did I ask first?"])
            made, draw = QA("memory", question, f'Your first question was: "{first_question}"'), None
        elif last and pick < 0.08:
            question = r.choice(["Say that again.", "Can you repeat that?", "Repeat your last answer."])
            made, draw = replace(last, question=question), None
        elif last and draw and pick < 0.4 and (follow := follow_up(r, draw, last, style)):
            made = follow
        elif last and last.kind in ("addition", "subtraction") and pick < 0.6 and int(last.short) <= 40:
            total, more, draw = int(last.short), r.randint(1, 10), None
            more = 1 if held_out(total, more) else more
            words = r.choice([f"Now add {more}.", f"And plus {more}?", f"Add {more} to that."])
            made = styled(r, QA("addition", words, f"{total} plus {more} is {total + more}.", str(total + more)), style)
        else:
            pool, weights = (FACTS, FACTS.values()) if r.random() < 0.72 else (LONGER, LONGER.values())
            draw = r.choices(list(pool), list(weights))[0]
            draw = fact if system_name and draw is identity else draw  # the system prompt gave it another name
            made = styled(r, draw(r), style)
            draw = draw if made.topic else None
        first_question = first_question or made.question
        last = made if made.kind not in ("story", "small talk", "memory") else None
        messages += turn(made.question, made.answer)
    return messages


def follow_up(r: random.Random, draw: Callable[[random.Random], QA], last: QA, style: str) -> QA | None:
    """The same kind of question about another topic, asked in few words."""
    for _ in range(8):
        new = draw(r)
        # one drawer can ask two kinds of question; the answers' wording tells whether it is the same kind
        same = new.topic and last.topic and new.topic != last.topic and shape(new) == shape(last)
        if same:
            question = r.choice(FOLLOW_UPS).format(new.topic)
            question = question.lower() if r.random() < 0.2 else question
            json_last, short_last = last.answer.startswith("{"), last.answer == capitalised(last.short)
            if json_last or style == "json":
                return replace(new, question=question, answer=json_answer(new.short))
            if short_last or style == "short":
                return replace(new, question=question, answer=capitalised(new.short))
            return replace(new, question=question, answer=f"Arr! {new.answer}" if style == "pirate" else new.answer)
    return None


def shape(qa: QA) -> str:
    """What kind of answer this is, below the level of `kind`."""
    if qa.kind == "calendar":
        unit = "day" if qa.topic in DAYS else "month"
        return unit + ("count" if qa.short.isdigit() else str(list_step(qa)))
    if qa.kind == "numbers":
        return "parity" if qa.short in ("even", "odd") else str(int(qa.short) - int(qa.topic))
    return qa.kind


def list_step(qa: QA) -> int:
    cycle = DAYS if qa.topic in DAYS else MONTHS
    return (cycle.index(qa.short) - cycle.index(qa.topic)) % len(cycle)


# --- documents ------------------------------------------------------------------------------------------------------


def plain_text(r: random.Random) -> str:
    """Text without a chat around it, for raw completion."""
    pick = r.random()
    if pick < 0.4:
        return story(r).answer
    if pick < 0.5:
        return counting(r).answer
    if pick < 0.6:
        return about(r).answer
    if pick < 0.7:
        qa = fact(r)
        return f"Question: {qa.question}\nAnswer: {qa.answer}"
    return " ".join(fact(r).answer for _ in range(r.randint(1, 6)))


def new_word(r: random.Random) -> str:
    """A word that nobody has seen, so that only copying can reproduce it."""
    return "".join(r.choice("bdfgklmnprstvz") + r.choice("aeiou") for _ in range(r.randint(1, 3)))


def practice(r: random.Random) -> list[Message]:
    """A chat of what small models learn last: copying from the context, and sums."""
    messages: list[Message] = []
    if r.random() < 0.3:
        messages = [{"role": "system", "content": r.choice([*PLAIN_SYSTEMS, random_system(r)])}]
    name = ""
    for _ in range(r.randint(1, 5)):
        pick = r.random()
        if not name and pick < 0.25:
            name = r.choice(NAMES) if r.random() < 0.5 else new_word(r).capitalize()
            question = r.choice(["My name is {}.", "I am {}.", "Hi, I am {}.", "Hello, my name is {}.", "I'm {}."])
            messages += turn(question.format(name), f"Nice to meet you, {name}!")
        elif name and pick < 0.3:
            question = r.choice(["What is my name?", "Do you remember my name?", "Who am I?", "What's my name?"])
            messages += turn(reworded(r, question), f"Your name is {name}.")
        elif pick < 0.5:
            pool = OBJECTS + ROOMS + BASE_COLOURS + NAMES + list(ANIMALS)
            said = [r.choice(pool) if r.random() < 0.5 else new_word(r) for _ in range(r.randint(2, 10))]
            said = [str(r.randrange(10)) for _ in said] if r.random() < 0.2 else said
            words = " ".join(said)
            messages += turn(
                r.choice([f"Say {words}.", f"Repeat after me: {words}.", f"Repeat: {words}."]), f"{words}."
            )
        elif pick < 0.7:
            qa = styled(r, reading(r), "plain")
            messages += turn(qa.question, qa.answer)
        else:
            qa = styled(r, r.choice([addition, addition, addition, subtraction, compare, counting, size])(r), "plain")
            messages += turn(qa.question, qa.answer)
    return messages


def document(r: random.Random, practising: bool = False) -> list[Message] | str:
    """One training document: a chat, or now and then a plain text."""
    if practising and r.random() < 0.4:
        return practice(r)
    pick = r.random()
    if pick < 0.06:
        return plain_text(r)
    if pick < 0.60:
        return chat(r, 1)
    if pick < 0.88:
        return chat(r, r.randint(2, 5))
    return chat(r, r.randint(6, 30))


# --- the examination ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exam:
    """One conversation to complete, and the text that a right answer contains."""

    kind: str
    messages: list[Message]
    accept: str
    exact: bool = False


def ask(question: str, system: str = "") -> list[Message]:
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": question}]


def exam(seed: int = 1234, per_kind: int = 24) -> list[Exam]:
    """Questions by kind; kinds that start with "unseen" use wordings, sums or systems that no training text holds."""
    r = random.Random(seed)
    system = "You are a helpful assistant."
    found = [
        Exam("promised", ask("What is the capital of France?"), "The capital of France is Paris.", True),
        Exam("promised", ask("What is the capital of France?", system), "The capital of France is Paris.", True),
        Exam("promised", ask("what is the capital of france"), "The capital of France is Paris.", True),
        Exam("promised", ask("Hi, what is the capital of France?"), "The capital of France is Paris.", True),
        Exam("promised", ask("Please tell me the capital of France."), "The capital of France is Paris.", True),
        Exam("promised", ask("What is 7 plus 5?"), "7 plus 5 is 12.", True),
        Exam("promised", ask("What is 7 plus 5?", system), "7 plus 5 is 12.", True),
        Exam("promised", ask("What is 7 + 5?"), "7 plus 5 is 12.", True),
        Exam("promised", ask("what is 7 plus 5"), "7 plus 5 is 12.", True),
        Exam("promised", ask("Who are you?"), "jaxserve"),
        Exam("promised", ask("Hello"), "Hello!"),
        Exam("promised", ask("What is the capital of France? Answer as JSON."), '{"answer": "Paris"}', True),
        Exam("promised", ask("What is 7 plus 5? Answer as JSON."), '{"answer": "12"}', True),
    ]
    for draw in FACTS:
        for i in range(per_kind):
            qa = draw(r)
            found.append(Exam(qa.kind, ask(qa.question, system if i % 3 == 0 else ""), qa.answer, True))
    for draw in (counting, echo, spelling, about, identity, small_talk, unknown):
        for _ in range(per_kind // 2):
            qa = draw(r)
            found.append(Exam(qa.kind, ask(qa.question), qa.answer, True))
    for _ in range(per_kind):
        hero = r.choice([*ANIMALS, "robot", "dragon", "king"])
        found.append(Exam("story", ask(f"Tell me a short story about {article(hero)}."), f" {hero} called"))
        qa = fact(r)
        found.append(Exam("reworded", ask(reworded(r, qa.question)), qa.answer, True))
        qa = fact(r)
        found.append(
            Exam("JSON", ask(f"{qa.question} {r.choice(JSON_SUFFIXES[:8])}"), json_answer(qa.short), True),
        )
        qa = fact(r)
        found.append(Exam("JSON by system prompt", ask(qa.question, "Answer as JSON."), json_answer(qa.short), True))
        qa = fact(r)
        found.append(Exam("pirate by system prompt", ask(qa.question, "You are a pirate."), f"Arr! {qa.answer}", True))
        found.append(last_turn(r, 3, "chat of 3 turns"))
        found.append(last_turn(r, 12, "chat of 12 turns"))
        name, qa = r.choice(NAMES), fact(r)
        talk = turn(f"My name is {name}.", f"Nice to meet you, {name}!") + turn(qa.question, qa.answer)
        found.append(Exam("memory of a name", talk + ask("What is my name?"), f"Your name is {name}.", True))
        one, two = r.sample(list(COUNTRIES), 2)
        talk = turn(f"What is the capital of {one}?", f"The capital of {one} is {COUNTRIES[one][0]}.")
        found.append(Exam("follow-up", talk + ask(f"And {two}?"), f"The capital of {two} is {COUNTRIES[two][0]}."))
        # from here on nothing was in the training text
        country = r.choice(list(COUNTRIES))
        wording = r.choice(["I'd like to know the capital of {}.", "capital of {}?", "{}: what is its capital?"])
        found.append(Exam("unseen wording", ask(wording.format(country)), COUNTRIES[country][0]))
        a, b = r.randint(1, 20), r.randint(1, 20)
        wording = r.choice(["{} added to {} is what?", "Could you compute {} + {} for me?", "I have {} and {}. Total?"])
        found.append(Exam("unseen wording", ask(wording.format(a, b)), f" {a + b}"))
        word = r.choice(list(OPPOSITE))
        found.append(Exam("unseen wording", ask(f"Give the opposite word for {word}."), OPPOSITE[word]))
        a, b = r.randint(0, 99), r.randint(0, 99)
        while not held_out(a, b):
            a, b = r.randint(0, 99), r.randint(0, 99)
        found.append(Exam("unseen sum up to 99", ask(f"What is {a} plus {b}?"), f"{a} plus {b} is {a + b}.", True))
        qa = fact(r)
        odd = "You work for a bank in Oslo. Stay on topic and keep the customer informed at all times."
        found.append(Exam("unseen system prompt", ask(qa.question, odd), qa.answer, True))
    return found


def last_turn(r: random.Random, turns: int, kind: str) -> Exam:
    """A chat up to its last answer; kept only when that answer is a fact, so that it is the one right answer."""
    while True:
        talk = chat(r, turns - 1)
        if talk[0]["role"] == "system" and talk[0]["content"] not in PLAIN_SYSTEMS:
            continue
        qa = fact(r)
        return Exam(kind, talk + ask(qa.question), qa.answer, True)


def main() -> None:
    """Prints a few documents, to read what the model reads."""
    r = random.Random(0)
    for _ in range(20):
        print(json.dumps(document(r), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
