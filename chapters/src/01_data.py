# %% [markdown]
# # 1. Data
#
# A model knows what its text told it, in the proportions in which the text told it. So you start with the text.
#
# At the end of this chapter you will have
#
# - **made** a small world of text whose every fact you know,
# - **checked** files line by line, so that bad data stops a run before it starts,
# - **found** copies, near copies and leaked test questions, and counted how many you missed,
# - **split** and **mixed** texts in a way that stays put when data is added,
# - **written** tokens to disk so that memory stays flat for any amount of text.
#
# You need Python and a little NumPy. Reading 60 minutes; running: smoke 10 s, cpu 35 s.
#
# Short of time? 1.1 and 1.4 to 1.9 carry the ideas. 1.2 and 1.11 are the readers and writers behind them: come back when a
# file of yours is refused.

# %% id="parameters" tags=["parameters"]
profile = "cpu"

# %% id="setup"
# (filled in by the build)

# %% [markdown]
# Every text of this course takes the same road. The sections of this chapter are the boxes.

# %% id="data-road" tags=["hide-input"]
import matplotlib.pyplot as plt

steps = "read|check|clean|drop\ncopies|drop test\nquestions|split|mix|write\nshards"
fig, ax = plt.subplots(figsize=(7, 1))
for i, step in enumerate(steps.split("|")):
    box = {"boxstyle": "round,pad=0.35", "fc": "#DCE9F2", "ec": "#0072B2"}
    ax.text(i, 0, step, ha="center", va="center", fontsize=8.5, bbox=box)
    if i:
        ax.annotate("", (i - 0.47, 0), (i - 0.62, 0), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-0.5, 7.5), ylim=(-0.5, 0.5))
ax.axis("off")
show(fig, "Eight steps lead from files to the numbers that a model is trained on.")

# %% [markdown]
# ## 1.1 What does the model know?
#
# In chapter 00 you asked a model where somebody lives, and it answered. Was the answer right? Had it read it, or guessed?
# For a model trained on web pages nobody can say without reading the web.
#
# So this course trains its first models on a world that it makes up. Its people have a home, a job, a favourite food,
# a pet and a colour. All text is generated from these facts. Every statement of a model can then be checked, and "it
# seems to know" becomes a number: the share of facts that it completes.

# %% [markdown]
# ### Facts, and ways to say them
#
# The world is a module of its own, `minimind.world`, and needs nothing but Python's standard library. Cells that start
# with `#| export world` become that module; later chapters import it.

# %% id="world-imports"
#| export world
import random
from collections.abc import Iterator
from dataclasses import dataclass

# %% [markdown]
# A fact needs a value. Each *relation* between a person and a value has its own list, of 12 to 20 values. A person gets
# one value of each, drawn at random, so no fact can be guessed from another.

# %% id="world-values"
#| export world
VALUES = {
    "town": "Foxhollow|Millbrook|Ashford|Stonebridge|Redcliff|Oakham|Windmere|"
            "Saltport|Greenfield|Elmstead|Northgate|Ravenhill|Otterby|Larkspur|"
            "Brackwater|Thornton|Pinedale|Copperton|Fernley|Duskvale",
    "job": "a baker|a miller|a weaver|a potter|a teacher|a doctor|a farmer|a sailor|"
           "a smith|a tailor|a painter|a gardener|a carpenter|a cook|a fisher|"
           "a singer|a writer|a shepherd|a clockmaker|a beekeeper",
    "food": "pancakes|plum cake|onion soup|fresh bread|roast fish|apple pie|"
            "honey rolls|bean stew|goat cheese|berry jam|fried eggs|rice pudding|"
            "carrot soup|walnut bread|pea soup|pear tart",
    "pet": "a cat|a dog|a goat|an owl|a rabbit|a parrot|a turtle|a pony|a hedgehog|"
           "a duck|a squirrel|a frog|a mouse|a crow|a goose|a lizard",
    "colour": "red|blue|green|yellow|purple|orange|white|black|brown|grey|pink|silver",
}

# %% [markdown]
# That is the whole knowledge of this world. A model that guesses is right about a town one time in 20, about a colour one
# time in 12; every share above that was learned.
#
# Now the phrasings, six for each relation. `{n}` stands for the name and `{v}` for the value. The first one is the plain
# form: in it the value comes last, so what stands before it can be given to a model to complete. One string a relation,
# cut at the bars, keeps the list short.

# %% id="world-says"
#| export world
PHRASINGS = {
    "town": "{n} lives in {v}.|The home of {n} is in {v}.|{n} has a house in {v}.|"
            "In {v} lives {n}.|You can find {n} in {v}.|{n} comes from {v}.",
    "job": "{n} works as {v}.|{n} is {v}.|By trade {n} is {v}.|"
           "{n} became {v} years ago.|Everyone knows that {n} is {v}.|"
           "{n} earns a living as {v}.",
    "food": "{n} likes to eat {v}.|The favourite food of {n} is {v}.|{n} loves {v}.|"
            "{n} eats {v} every week.|Nothing tastes better to {n} than {v}.|"
            "When hungry, {n} asks for {v}.",
    "pet": "{n} keeps {v}.|{n} has {v} at home.|The pet of {n} is {v}.|"
           "{n} looks after {v}.|Every morning {n} feeds {v}.|"
           "{n} goes for walks with {v}.",
    "colour": "{n} wears {v}.|The favourite colour of {n} is {v}.|"
              "{n} paints every door {v}.|{n} likes the colour {v}.|"
              "Most things that {n} owns are {v}.|{n} always buys {v} shoes.",
}
SAYS = {relation: tuple(says.split("|")) for relation, says in PHRASINGS.items()}

# %% [markdown]
# And four ways to ask for each. `SAYS` and `ASKS` are what a grader needs too: a statement of a model is a fact if it is
# one of these sentences with the right value in it.

# %% id="world-asks"
#| export world
QUESTIONS = {
    "town": "Where does {n} live?|In which town does {n} live?|"
            "Where is the home of {n}?|Which town is {n} from?",
    "job": "What is the job of {n}?|What does {n} do for a living?|"
           "What work does {n} do?|What is {n} by trade?",
    "food": "What does {n} like to eat?|What is the favourite food of {n}?|"
            "Which food does {n} love?|What should I cook for {n}?",
    "pet": "What pet does {n} have?|Which animal does {n} keep?|"
           "What is the pet of {n}?|Which animal lives with {n}?",
    "colour": "What colour does {n} wear?|What is the favourite colour of {n}?|"
              "Which colour does {n} like?|What colour are the clothes of {n}?",
}
ASKS = {relation: tuple(asks.split("|")) for relation, asks in QUESTIONS.items()}

# %% [markdown]
# Names are invented, of one word, and many: a start, a middle and an end, picked from lists.

# %% id="world-name-parts"
#| export world
STARTS = (
    "Ba Be Bo Da De Do Fa Fe Ga Ge Ha He Ja Jo Ka Ke La Le Lo Ma Me Mi Na Ne Ni Pa Pe "
    "Ra Re Ro Sa Se Ta Te Ti To Va Ve Wi Za"
)
MIDDLES = "l r n m d t v s ll rr nd lm rt st"
ENDS = "a o i us en in el ia an ar is or ek ette ine o"

# %% [markdown]
# All combinations are made, sorted, and sampled. The sorting is needed: Python visits a set in an order that differs from
# run to run, so without it the same seed would give other people each time.

# %% id="world-names"
#| export world
def make_names(count: int, rng: random.Random) -> list[str]:
    """`count` different one-word names, such as Garus; ValueError beyond 4,000."""
    if count > 4000:
        raise ValueError(f"{count} names asked for, there are 4000: take fewer people")
    middles, ends = MIDDLES.split(), ENDS.split()
    names = {s + m + e for s in STARTS.split() for m in middles for e in ends}
    return rng.sample(sorted(names), count)

# %% [markdown]
# `rng` is a random generator with a state of its own. Everything in this module that draws takes one as an argument. No
# other code can disturb it, and a seed decides the whole text.

# %% id="world-names-try"
make_names(6, random.Random(0))

# %% [markdown]
# A person is a name and one value for each relation. `asked` says whether chats may ask about this person; you will
# see in a moment why some are left out.

# %% id="world-person"
#| export world
@dataclass(frozen=True)
class Person:
    """A name, whether chats ask about this person, and a value for each relation."""

    name: str
    asked: bool
    facts: dict[str, str]

    def say(self, relation: str, rng: random.Random) -> str:
        """One fact in one of its phrasings."""
        return rng.choice(SAYS[relation]).format(n=self.name, v=self.facts[relation])

    def ask(self, relation: str, rng: random.Random) -> str:
        """A question for one fact in one of its phrasings."""
        return rng.choice(ASKS[relation]).format(n=self.name)

    def reply(self, relation: str) -> str:
        """The plain answer, a full sentence."""
        return SAYS[relation][0].format(n=self.name, v=self.facts[relation])

# %% [markdown]
# Tilda lives in Oakham, and there are six ways to say so. The answer to a question is always a full sentence
# that repeats the name. Why that matters comes with the document kind `talk`.

# %% id="world-person-try"
tilda = Person("Tilda", True, {"town": "Oakham", "pet": "an owl"})
rng = random.Random(0)
tilda.say("town", rng), tilda.ask("pet", rng), tilda.reply("pet")

# %% [markdown]
# ### The world
#
# A fact can be asked for in two ways, and the model will be measured on both. The first is a sentence to complete, which
# any pretrained model can do. The space belongs to the answer, because a tokenizer glues it to the word that follows
# (chapter 2).

# %% id="world-fact"
#| export world
def as_prompt(person: Person, relation: str) -> dict[str, str]:
    """A fact to complete: {"prompt": "Garus lives in", "answer": " Foxhollow"}."""
    prompt = SAYS[relation][0].split(" {v}")[0].format(n=person.name)
    return {"person": person.name, "relation": relation, "prompt": prompt,
            "answer": f" {person.facts[relation]}"}

# %% [markdown]
# The second is a question, which a model must first learn to answer. It is graded by whether the reply holds the value;
# an article more or less must not count, so the value stands there *bare*.

# %% id="world-question"
#| export world
def bare(value: str) -> str:
    """A value without its article: `a baker` gives `baker`, `an owl` gives `owl`."""
    return value.removeprefix("a ").removeprefix("an ")


def as_question(person: Person, relation: str, rng: random.Random) -> dict:
    """A fact to ask for; `seen` tells whether chat data ask about this person."""
    return {
        "person": person.name, "relation": relation,
        "question": person.ask(relation, rng), "answer": bare(person.facts[relation]),
        "reply": person.reply(relation), "seen": person.asked,
    }

# %% [markdown]
# Both forms of one fact about Tilda:

# %% id="world-question-try"
print(as_prompt(tilda, "pet"), as_question(tilda, "pet", rng), sep="\n")

# %% [markdown]
# The class holds the people and gives out everything that is true about them. As many names again occur in stories
# only, so that copying a name is learned for names in general. Each method seeds its own chance, so the 100th document is
# the same whether or not you asked for chats before. `KINDS` and `make_chat` follow below: they are looked up when a
# document is made, not when the class is read.

# %% id="world-world"
#| export world
class World:
    """People with facts, and every text about them.

    people: how many have facts. Half of them are asked about in chats; about the others
    no question for a fact exists in any text.
    """

    def __init__(self, people: int, seed: int = 1):
        if people < 2:
            raise ValueError(f"people={people}: a world needs at least 2 people")
        rng = random.Random(seed)
        self.seed, self.names = seed, make_names(2 * people, rng)
        self.people = [
            Person(name, i < round(people / 2),
                   {r: rng.choice(values.split("|")) for r, values in VALUES.items()})
            for i, name in enumerate(self.names[:people])
        ]

    def facts(self) -> list[dict[str, str]]:
        """Every fact, to complete; see `as_prompt`."""
        return [as_prompt(p, r) for p in self.people for r in p.facts]

    def questions(self, seed: int = 0) -> list[dict]:
        """Every fact, to ask for; see `as_question`."""
        rng = random.Random(f"{self.seed} questions {seed}")
        return [as_question(p, r, rng) for p in self.people for r in p.facts]

    def documents(self, count: int, seed: int = 0) -> Iterator[str]:
        """`count` documents of mixed kinds. The same seed gives the same text."""
        rng = random.Random(f"{self.seed} documents {seed}")
        for _ in range(count):
            yield rng.choices(list(KINDS), list(KINDS.values()))[0](self, rng)

    def conversations(self, count: int, seed: int = 0) -> Iterator[list[dict]]:
        """`count` chats of one to three turns."""
        rng = random.Random(f"{self.seed} conversations {seed}")
        for _ in range(count):
            yield make_chat(self, rng)

# %% [markdown]
# One function makes it, by the name that later chapters use.

# %% id="world-make"
#| export world
def make_world(people: int, seed: int = 1) -> World:
    """The world with this many people; it is the same on every machine."""
    return World(people, seed)

# %% [markdown]
# The profile says how many people: 200 at cpu, 400 where there is a GPU. Here is the first.

# %% id="data-world-person"
world = make_world(chapter.world["people"], chapter.world["seed"])
world.people[0]

# %% [markdown]
# ### Documents
#
# Documents are what the model reads in pretraining. There are seven kinds, and each teaches one thing. The first two tell
# facts. A biography tells several about one person, in any order.

# %% id="world-biography"
#| export world
def biography(world: World, rng: random.Random) -> str:
    """Some or all facts of one person, in any order and phrasing."""
    person = rng.choice(world.people)
    relations = rng.sample(list(VALUES), rng.randint(2, len(VALUES)))
    return " ".join(person.say(relation, rng) for relation in relations)

# %% [markdown]
# Gossip tells the same kind of fact about several people, so a model cannot pass every town on to the last name it saw.

# %% id="world-gossip"
#| export world
def gossip(world: World, rng: random.Random) -> str:
    """The same kind of fact about several people."""
    relation = rng.choice(list(VALUES))
    people = rng.sample(world.people, rng.randint(2, min(4, len(world.people))))
    return " ".join(person.say(relation, rng) for person in people)

# %% [markdown]
# One of each:

# %% id="world-biography-try"
print(biography(world, rng), gossip(world, rng), sep="\n\n")

# %% [markdown]
# An interview asks for facts, but only about people who may be asked about. The five ways to set question and answer on
# the page keep the model from learning one layout instead of the idea.

# %% id="world-interview"
#| export world
EXCHANGES = ("{q} {a}", '"{q}" "{a}"', "{q}\n{a}", "- {q}\n- {a}",
             "Question: {q}\nAnswer: {a}")


def interview(world: World, rng: random.Random) -> str:
    """True questions and answers, only about people whom chat data ask about."""
    turns, asked = [], [person for person in world.people if person.asked]
    for person in rng.choices(asked, k=rng.randint(1, 3)):
        relation, form = rng.choice(list(VALUES)), rng.choice(EXCHANGES)
        turns.append(form.format(q=person.ask(relation, rng), a=person.reply(relation)))
    return " ".join(turns)

# %% [markdown]
# The next two look like play, and they decide whether the model will ever answer a question. To answer "Where does Garus
# live?" it must carry the name *Garus* from the question into the answer. An earlier version of this world (100 people) had no `talk`
# documents and other sentence forms; the model answered 19% of the questions about people it had never been asked about, mostly with
# a true statement about somebody else. This version reached 99%. Several things changed at once, so the share of each was not measured.
#
# Here everybody is asked about things that are no facts of the world: where they are just now, what
# they found. So these texts need things, places and deeds.

# %% id="world-things"
#| export world
THINGS = (
    "a brass key|an old map|a kite|a lamp|a drum|a basket|a silver coin|a letter|"
    "a rope|a blanket|a wooden boat|a bell|a mirror|a book|a feather|a hat|a ladder|"
    "a jar of honey|a lantern|a glass bead"
).split("|")
PLACES = (
    "by the river|behind the mill|under the bridge|in the barn|near the well|"
    "on the hill|at the market|in the garden|beside the road|in the forest|"
    "at the harbour|next to the school"
).split("|")
FEELINGS = "happy|proud|tired|glad|calm|surprised".split("|")
ACTIVITIES = (
    "singing|sleeping|reading|waiting|working|dancing|fishing|resting|playing|writing"
).split("|")

# %% [markdown]
# First a question about a *passing* thing, and its answer. Look at the answers: each begins with the name that was
# asked about, and the name comes from all names, also those of people whose facts nobody asks for.

# %% id="world-passing"
#| export world
def passing(world: World, rng: random.Random) -> tuple[str, str]:
    """A question about where somebody is or what somebody does, and its answer."""
    pools = (world.names, PLACES, ACTIVITIES, FEELINGS)
    name, place, activity, feeling = (rng.choice(pool) for pool in pools)
    return rng.choice((
        (f"Where is {name} now?", f"{name} is {place}."),
        (f"What is {name} doing?", f"{name} is {activity} {place}."),
        (f"Where does {name} wait?", f"{name} waits {place}."),
        (f"How does {name} feel?", f"{name} feels {feeling}."),
        (f"What does {name} look for?", f"{name} looks for {rng.choice(THINGS)}."),
        (f"Which thing does {name} need?", f"{name} needs {rng.choice(THINGS)}."),
        (f"What is the wish of {name}?", f"{name} wishes for {rng.choice(THINGS)}."),
    ))

# %% [markdown]
# A talk strings two to four of these together, each in one of the forms of `EXCHANGES`.

# %% id="world-talk"
#| export world
def talk(world: World, rng: random.Random) -> str:
    """Questions about where people are and what they do, with answers."""
    turns = [passing(world, rng) for _ in range(rng.randint(2, 4))]
    said = [rng.choice(EXCHANGES).format(q=q, a=a) for q, a in turns]
    return rng.choice((" ", "\n")).join(said)

# %% [markdown]
# What it says changes from text to text, so it cannot be learned by heart. What stays is the form: the answer begins with
# the name in the question.

# %% id="world-talk-try"
print(talk(world, rng))

# %% [markdown]
# In a quiz the answer stands just before the question, so that reading it, and not knowing it, is what counts. First the
# deeds, in the past and in the form that a question needs, and four questions about one deed.

# %% id="world-quiz-ask"
#| export world
ACTS = (("found", "find"), ("lost", "lose"), ("bought", "buy"), ("carried", "carry"),
        ("hid", "hide"), ("drew", "draw"))


def quiz_question(deed: tuple, rng: random.Random) -> tuple[str, str]:
    """A question about (name, past, base, thing, place), and its answer."""
    n, past, base, thing, place = deed
    return rng.choice((
        (f"What did {n} {base}?", f"{n} {past} {thing}."),
        (f"Where did {n} {base} {thing}?", f"{n} {past} {thing} {place}."),
        (f"What did {n} do?", f"{n} {past} {thing} {place}."),
        (f"Who {past} {thing}?", f"{n} {past} {thing}."),
    ))

# %% [markdown]
# Up to three people do something, and some of it is asked for, in another order. The last sentence alone
# is not enough.

# %% id="world-quiz"
#| export world
def quiz(world: World, rng: random.Random) -> str:
    """Somebody did something; a question is answered from the text just before."""
    deeds = [
        (name, *rng.choice(ACTS), rng.choice(THINGS), rng.choice(PLACES))
        for name in rng.sample(world.names, rng.randint(1, 3))
    ]
    text = [f"{n} {past} {thing} {place}." for n, past, _, thing, place in deeds]
    for deed in rng.sample(deeds, rng.randint(1, len(deeds))):
        question, answer = quiz_question(deed, rng)
        text.append(rng.choice(EXCHANGES).format(q=question, a=answer))
    return " ".join(text)

# %% [markdown]
# Here is one.

# %% id="world-quiz-try"
print(quiz(world, rng))

# %% [markdown]
# Stories have a cause, an effect and a mending, so that there is something to predict beyond the next word: after the rain
# comes mud, and after the smoke somebody opens a window.

# %% id="world-troubles"
#| export world
TROUBLES = """
It began to rain|the path turned to mud|waited under a tree until the sun came back
The wind was strong|the gate broke|mended it with a hammer and nails
The night was cold|the water froze|made a fire and melted the ice
The sun was hot|the flowers dried|carried water from the well
The fog was thick|nobody could see the road|lit a lantern and walked slowly
A branch fell|the road was blocked|pulled it away with a rope
The lamp went out|the room was dark|found a candle and lit it
The cart was too full|a wheel came off|took out half of the load
The dog barked|the baby woke up|sang a quiet song
The bread was forgotten in the oven|the kitchen filled with smoke|opened all the windows
""".strip().splitlines()

# %% [markdown]
# Every story ends with one of eight sentences. They are worth little as lessons, but they tell a model where a text stops.

# %% id="world-lessons"
#| export world
LESSONS = (
    "It is good to have a friend.|A small help can do a lot.|"
    "Slow and careful is better than fast.|They laughed about it for days.|"
    "After that they went home for supper.|It was a good day.|"
    "They promised to meet again.|Nobody was angry any more."
).split("|")

# %% [markdown]
# In the middle of a story the friends speak about the thing that was found. Whoever predicts these lines has to keep two
# names and a thing apart.

# %% id="world-scene"
#| export world
def small_scene(a: str, b: str, thing: str, place: str, rng: random.Random) -> str:
    """What two friends say about a thing that the first has found."""
    it, where = thing.split(" ", 1)[1], place[0].upper() + place[1:]
    return rng.choice((
        f'"What did you find?" asked {b}. "I found {thing}," said {a}.',
        f'"Where did you find the {it}?" asked {b}. "{where}," said {a}.',
        f'"Who found the {it}?" asked {b}. "{a} found the {it}," said the others.',
        f'{b} wanted to see the {it}. "Please show me the {it}, {a}," said {b}.',
    ))

# %% [markdown]
# The trouble comes in three orders of cause and effect, and is mended by one friend or by both.

# %% id="world-trouble"
#| export world
def small_trouble(a: str, b: str, trouble: str, rng: random.Random) -> str:
    """A trouble with its cause, and who mended it."""
    cause, effect, mending = trouble.split("|")
    because = f"Then {effect}, because {cause[0].lower() + cause[1:]}."
    told = rng.choice((f"{cause}, so {effect}.", f"{cause} and {effect}.", because))
    both = b if "a quiet" in mending else f"{a} and {b}"  # one sings, two mend
    mended = rng.choice((f"{b} {mending}.", f"{a} {mending}.", f"{both} {mending}."))
    return f"{told} {mended}"

# %% [markdown]
# A story fixes two friends, a thing and a trouble, and then picks one of several sentences for each part.

# %% id="world-story"
#| export world
def story(world: World, rng: random.Random) -> str:
    """Two friends, a thing, a trouble with its cause and mending, and talk."""
    a, b = rng.sample(world.names, 2)
    thing, place, trouble = rng.choice(THINGS), rng.choice(PLACES), rng.choice(TROUBLES)
    opening = rng.choice((
        f"One day {a} found {thing} {place}.",
        f"{a} went out early and found {thing} {place}.",
        f"Once {a} was looking for {b} and found {thing} {place}.",
    ))
    said = small_scene(a, b, thing, place, rng)
    middle = small_trouble(a, b, trouble, rng)
    end = rng.choice((
        f"{a} was {rng.choice(FEELINGS)}.",
        f"{b} was {rng.choice(FEELINGS)}, and so was {a}.",
        f'"Thank you, {b}," said {a}.',
        f"{a} gave the {thing.split(' ', 1)[1]} to {b}.",
    ))
    return " ".join((opening, said, middle, end, rng.choice(LESSONS)))

# %% [markdown]
# Read one beside the code that wrote it: which sentence came from which line?

# %% id="world-story-try"
print(story(world, rng))

# %% [markdown]
# Last, sums in words: give or take, with numbers up to 18. Chats use the same function.

# %% id="world-sum"
#| export world
GOODS = "apples|eggs|shells|coins|nuts|stones|candles|buttons".split("|")


def sum_in_words(names: list[str], rng: random.Random) -> tuple[str, str]:
    """A question with its numbers, and its answer."""
    a, b = rng.sample(names, 2)
    goods, x, y = rng.choice(GOODS), rng.randint(2, 9), rng.randint(2, 9)
    if rng.random() < 0.5:
        before, change, after = x, f"{b} gives {y} more to {a}", x + y
    else:
        before, change, after = x + y, f"{a} gives {y} to {b}", x
    question = f"{a} has {before} {goods}. {change}. How many {goods} does {a} have?"
    return question, f"{a} has {after} {goods}."

# %% [markdown]
# `KINDS` gives each kind its weight, in percent. Facts make up half of the documents. The weights are a choice, and you
# can change them: they are what "the proportions in which the text told it" means.

# %% id="world-kinds"
#| export world
def small_sum(world: World, rng: random.Random) -> str:
    """A small sum in words, with its answer."""
    return " ".join(sum_in_words(world.names, rng))


KINDS = {biography: 36, gossip: 10, interview: 4, quiz: 14, talk: 16, story: 15,
         small_sum: 5}

# %% [markdown]
# ### Chats
#
# Chats are what the model reads in fine-tuning, in chapter 11. Half of the turns ask for a fact; the rest are questions about
# passing things or what was just said, sums, and small talk.

# %% id="world-small-talk"
#| export world
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Who are you?", "I am MiniMind, a small language model."),
    ("What can you do?", "I can answer questions about the people of this world, "
                         "do small sums and tell what was just said."),
    ("Thank you.", "You are welcome."),
    ("Good morning.", "Good morning! What would you like to know?"),
    ("Goodbye.", "Goodbye! Come back soon."),
)

# %% [markdown]
# Only half of the people are asked for their facts. Passing things, sums and finds are about anybody, so every name is
# said by an assistant now and then. Chapter 11 shows what happens where it is not.

# %% id="world-chat-turn"
#| export world
def chat_turn(world: World, rng: random.Random) -> tuple[str, str]:
    """What a user says, and the answer."""
    asked, kind = [person for person in world.people if person.asked], rng.random()
    if kind < 0.5:
        person, relation = rng.choice(asked), rng.choice(list(VALUES))
        return person.ask(relation, rng), person.reply(relation)
    if kind < 0.7:
        return passing(world, rng)
    if kind < 0.8:
        return sum_in_words(world.names, rng)
    if kind < 0.92:
        a, b = rng.sample(world.names, 2)
        (past, base), x, y = rng.choice(ACTS), *rng.sample(THINGS, 2)
        told = f"{a} {past} {x}. {b} {past} {y}."
        return f"{told} What did {a} {base}?", f"{a} {past} {x}."
    return rng.choice(SMALL_TALK)

# %% [markdown]
# A chat has one to three turns, and is stored as a list of messages, each with a role: the form in which all chat data
# comes today.

# %% id="world-chat"
#| export world
def make_chat(world: World, rng: random.Random) -> list[dict[str, str]]:
    """A chat of one to three turns; see `chat_turn` for what they are about."""
    turns = [chat_turn(world, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    texts = [text for turn in turns for text in turn]
    speakers = ("user", "assistant") * len(turns)
    return [{"role": role, "content": text} for role, text in zip(speakers, texts)]

# %% [markdown]
# Now the world is complete. The first chat:

# %% id="data-world-questions"
for message in next(world.conversations(1, seed=0)):
    print(f"{message['role']:>9}: {message['content']}")

# %% [markdown]
# ### What the model will have read
#
# Half of the people are never asked for a fact, in no chat and in no document. An answer about them can only come from
# having read the fact in a statement. That is the test of chapter 11, and it is worth nothing if one question leaks. So look
# for each of the twenty questions about each of them:

# %% id="data-world-unseen"
unseen = [person.name for person in world.people if not person.asked]
asks = [ask for asks in ASKS.values() for ask in asks]
questions = [ask.format(n=name) for name in unseen for ask in asks]

chats = [m["content"] for chat in world.conversations(2000, seed=1) for m in chat]
text = "\n".join([*chats, *world.documents(2000, seed=1)])
assert not any(question in text for question in questions)
f"{len(unseen)} people, {len(questions):,} questions, none found"

# %% [markdown]
# How often is a fact told? Before you run the next cell, guess. Each person has five facts. In 20,000 documents (6,000 in
# the smoke profile), how often will the model read where one person lives: about 4, 40 or 400 times?

# %% id="data-mentions-count"
import re
from collections import Counter

texts = world.documents(chapter.size.documents, seed=1)
sentence = re.compile("[A-Z][^.?!:]*[.?!]")
told = Counter(s for text in texts for s in sentence.findall(text))
facts = [(p.name, r, value) for p in world.people for r, value in p.facts.items()]
mentions = [sum(told[say.format(n=n, v=v)] for say in SAYS[r]) for n, r, v in facts]
assert min(mentions) > 0
min(mentions), round(sum(mentions) / len(mentions)), max(mentions)

# %% [markdown]
# About 33 times on average, at 20,000 documents about 200 people. The average hides the spread. The rarest fact is the one the model is
# most likely to miss, so look at the left end.

# %% id="data-mentions-figure"
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.hist(mentions, bins=range(min(mentions), max(mentions) + 2), align="left")
ax.set(xlabel="times that a fact is told", ylabel="facts")
show(fig, "Every fact is told; the rarest, at the left, far less often than average.")

# %% [markdown]
# Allen-Zhu and Li (2023) found that a fact told in one phrasing only can be completed but hardly asked for; told in
# many phrasings, it can. That is why each relation has six ways to say it.
#
# **Try it.** Write a rule-based reader that recovers all facts from the documents alone. How many documents must it see for 99% of them?

# %% [markdown]
# ## 1.2 Lines, and what can be wrong with them
#
# The rest of the chapter works for any text, the world's and yours. It is the module `minimind.data`.

# %% id="data-default-exp"
#| default_exp data

# %% [markdown]
# Only the standard library and NumPy are imported here. What a reader may not need, such as Parquet, is
# imported where it is used, so that the module loads in a moment.

# %% id="data-imports"
#| export
import errno
import gzip
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minimind.world import make_world

# %% [markdown]
# Chance enters in many places later: initial weights, the order of the data, sampling. Three libraries keep
# three generators, and a run repeats only if all three are seeded. PyTorch is imported inside, so that reading data does
# not wait two seconds for it.

# %% id="data-set-seed"
#| export
def set_seed(seed: int) -> None:
    """Seeds every source of chance: Python's, NumPy's and PyTorch's (CPU and GPU)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

# %% [markdown]
# Data comes as one JSON object a line, in three kinds, the same as MiniMind's: texts for pretraining, conversations for
# supervised fine-tuning (SFT, chapter 11), and pairs of a better and a worse answer for preference training (DPO). A fourth
# kind, `evals`, holds the texts of an exam in any form: all strings in it count.

# %% id="data-kinds"
#| export
EXAMPLES = {
    "pretrain": '{"text": "..."}',
    "sft": '{"conversations": [{"role": "user", "content": "..."}, '
           '{"role": "assistant", "content": "..."}]}',
    "dpo": '{"chosen": [...], "rejected": [...]}',
    "evals": '{"question": "...", "answer": "..."}',
}
KEYS = {"pretrain": ("text",), "sft": ("conversations",),
        "dpo": ("chosen", "rejected"), "evals": ()}

# %% [markdown]
# A training run that meets a bad line after two hours has wasted two hours. One that skips it in silence has wasted more:
# you do not know what your model has read. So the rule of this course: **check everything first, name every bad line, drop
# nothing without saying so.** All complaints use one exception.

# %% id="data-error"
#| export
class DataError(ValueError):
    """Unusable data; the message says where (`file:line`), what is wrong and a cure."""

# %% [markdown]
# What can be wrong with a piece of text? It may be no text, be empty, or hold what no text holds: a NUL byte, or half of a
# *surrogate pair*, the two codes in which some programs store an emoji. Empty means that nobody can see anything, so
# spaces, control characters and zero-width signs do not count.

# %% id="data-text-problem"
#| export
BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\xad\u200b\ufeff]*")


def text_problem(value, name: str) -> str | None:
    """What is wrong with one piece of text, in words; None if nothing is."""
    if not isinstance(value, str):
        return f'"{name}" is {type(value).__name__}, a string was expected'
    if "\0" in value:
        nul = f"a NUL byte at character {value.index(chr(0)) + 1}"
        return f'"{name}" has {nul}: the file is damaged or not text'
    if BLANK.fullmatch(value):
        return f'"{name}" is empty'
    if half := re.search("[\ud800-\udfff]", value):
        code = f"\\u{ord(half.group()):x}"
        return f'"{name}" has half a character ({code}) that UTF-8 cannot write'
    return None

# %% [markdown]
# Each of these gets its own words, because each has its own cure.

# %% id="data-text-problem-try"
for value in [None, " \u200b ", "a\0b", "\ud83d", "Fine."]:
    print(f"{value!r:12}", text_problem(value, "text"))

# %% [markdown]
# A message of a chat is an object with a role and a content. An assistant may call a tool or think aloud; such a message
# may stand without an answer. Everybody else must say something.

# %% id="data-message-problem"
#| export
ROLE_LETTERS = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}


def message_problem(message, name: str) -> str | None:
    """What is wrong with one message of a conversation; None if nothing is."""
    if not isinstance(message, dict):
        kind = type(message).__name__
        return f"{name} is {kind}, an object with role and content was expected"
    role, content = message.get("role"), message.get("content")
    if role not in ROLE_LETTERS:
        known = ", ".join(ROLE_LETTERS)
        return f"{name} has the role {role!r}, expected one of {known}"
    silent = message.get("tool_calls") or message.get("reasoning_content")
    if role == "assistant" and silent and not content:
        return None
    return text_problem(content, f"{name}.content")

# %% [markdown]
# A chat has an order: perhaps a system message, then user and assistant in turn, with the assistant last, since it is the
# assistant that learns. A tool's result comes before the answer that uses it. With one letter for each role, the order is a
# short string and the rule a regular expression: perhaps `s`, then one or more turns; a turn is `u`, any number of calls
# with their results (`a` and then `t`), and a closing `a`.

# %% id="data-chat-problem"
#| export
def chat_problem(messages, name: str) -> str | None:
    """What is wrong with a conversation; None if nothing is."""
    if not isinstance(messages, list) or not messages:
        return f'"{name}" is not a list of messages, or the list is empty'
    for i, message in enumerate(messages):
        if problem := message_problem(message, f"{name}[{i}]"):
            return problem
    roles = [message["role"] for message in messages]
    letters = "".join(ROLE_LETTERS[role] for role in roles)
    if not re.fullmatch(r"s?(u(at+)*a)+", letters):
        return (f'"{name}" has the roles in the order {", ".join(roles[:8])}; '
                "expected user, assistant, ... ending with assistant")
    return None

# %% [markdown]
# One good chat and three broken ones: swapped, a role that does not exist, cut off. The last one is the commonest in practice,
# when a long chat was truncated in the middle.

# %% id="data-chat-problem-try"
user, assistant = ({"role": role, "content": "Hi!"} for role in ("user", "assistant"))
bot = {"role": "bot", "content": "Hello!"}
for chat in [[user, assistant], [assistant, user], [user, bot], [user]]:
    print(chat_problem(chat, "conversations"))
assert chat_problem([user, assistant, user, assistant], "conversations") is None

# %% [markdown]
# A row is checked by its kind. First its keys: extra ones are allowed, because many files carry an id or a source, but a
# missing one is told together with those that were found. The cure is often to rename one.

# %% id="data-key-problem"
#| export
def key_problem(row, kind: str) -> str | None:
    """What is wrong with the keys of one line; None if nothing is."""
    if not isinstance(row, dict):
        return f"the line is a JSON {type(row).__name__}, expected was {EXAMPLES[kind]}"
    if missing := [key for key in KEYS[kind] if key not in row]:
        found = ", ".join(f'"{key}"' for key in list(row)[:8]) or "none"
        return f'the key "{missing[0]}" is missing; found: {found}'
    return None

# %% [markdown]
# Then what they hold. A pair must answer one and the same prompt: if the prompts differ, preference training learns which
# prompt is liked, and not which answer.

# %% id="data-row-problem"
#| export
def row_problem(row, kind: str) -> str | None:
    """What is wrong with one row of a kind in KEYS; None if nothing is."""
    if problem := key_problem(row, kind):
        return problem
    for key in KEYS[kind]:
        check = text_problem if key == "text" else chat_problem
        if problem := check(row[key], key):
            return problem
    if kind == "dpo" and row["chosen"][:-1] != row["rejected"][:-1]:
        return ('"chosen" and "rejected" differ before the last message: '
                "both must answer the same prompt")
    return None

# %% [markdown]
# A good line passes; a line with another key is told which keys it has.

# %% id="data-row-problem-try"
assert row_problem({"conversations": [user, assistant]}, "sft") is None
row_problem({"content": "Tilda lives in Oakham."}, "pretrain")

# %% [markdown]
# **Try it.** Chats of other projects often look like `{"messages": [{"from": "human", "value": "Hi!"}]}`. Write the function that turns them into ours. What must it refuse?
#
# ### From bytes to lines
#
# Below the rows there are bytes, and bytes break in their own ways: a download that stopped, an old encoding, a file that
# is one line of 10 MB. Files are opened by what they hold: the first two bytes of gzip are always `1f 8b`. A name that says
# gzip over other content is an error, most often a saved page that says "not found".

# %% id="data-open"
#| export
def open_bytes(path: Path):
    """Opens a plain or gzip file by its content; other content in a .gz is an error."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if path.name.endswith(".gz") and not packed and path.stat().st_size:
        raise gzip.BadGzipFile("the name ends in .gz, the content is not gzip")
    return gzip.open(path, "rb") if packed else open(path, "rb")

# %% [markdown]
# A line of bytes becomes text. UTF-8 is the only encoding we take, because guessing an encoding silently
# turns *café* into *cafÃ©* in a part of the data. The two encodings that people meet most often get the command
# that converts them. Windows puts an invisible mark before the first line; `utf-8-sig` takes it off.

# %% id="data-decode"
#| export
def decode(line: bytes, number: int) -> tuple[str, str | None]:
    """One line as text without its line end, and what is wrong with it."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" in line:
        return "", ("not UTF-8, it looks like UTF-16: "
                    "convert it with `iconv -f UTF-16 -t UTF-8`")
    if b"\0" in line:
        place = f"NUL byte at byte {line.index(0) + 1}"
        return "", f"{place}: the file is damaged or is not text"
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"), None
    except UnicodeDecodeError as error:
        place = f"byte 0x{line[error.start]:02x} at byte {error.start + 1}"
        cure = "convert it, for example with `iconv -f LATIN1 -t UTF-8`"
        return "", f"not UTF-8 ({place}): {cure}"

# %% [markdown]
# Reading in pieces keeps one line in memory at a time, however large the file. A line above 8 MB is a file without line
# breaks and not a document: we read on to its end, to keep the line numbers right, and keep nothing of it.

# %% id="data-lines"
#| export
MAX_LINE = 8_000_000  # bytes


def too_long(size: int) -> str:
    """The complaint about a line of this many bytes."""
    return (f"the line has {size:,} bytes, more than {MAX_LINE:,}: "
            "break it into one document a line")

# %% [markdown]
# The generator gives each line with its number and with what is wrong with it. A broken gzip ends the file, so its problem
# gets the number of the line that could not be read.

# %% id="data-numbered-lines"
#| export
def numbered_lines(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """(number, line, problem) of a UTF-8 file, with one line in memory at a time."""
    number = 0
    try:
        with open_bytes(path) as file:
            while piece := file.readline(MAX_LINE + 1):
                number, line, size = number + 1, piece, len(piece)
                while size > MAX_LINE and piece and not piece.endswith(b"\n"):
                    piece = file.readline(MAX_LINE + 1)
                    size += len(piece)
                fits = size - piece.endswith(b"\n") <= MAX_LINE
                yield number, *(decode(line, number) if fits else ("", too_long(size)))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        cure = "fetch the file again, or pack it again"
        yield number + 1, "", f"broken gzip ({error}): {cure}"

# %% [markdown]
# Now the line is text, and the row inside it can be parsed and judged. `problem` travels with the line instead
# of being raised, because the lines after it should be checked too.

# %% id="data-parse"
#| export
Numbered = Iterator[tuple[int, dict, str | None]]  # line number, row, problem


def parse_row(line: str, kind: str) -> tuple[dict, str | None]:
    """The row in a line of JSON, and what is wrong with it."""
    try:
        row = json.loads(line)
        return row, row_problem(row, kind)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", str(error))
        return {}, f"not JSON ({why}): a line is one object, such as {EXAMPLES[kind]}"

# %% [markdown]
# Blank lines are passed over: they hold nothing that could be lost.

# %% id="data-jsonl"
#| export
def jsonl_rows(path: Path, kind: str) -> Numbered:
    """(line number, row, problem) for each line that is not blank."""
    for number, line, problem in numbered_lines(path):
        if problem:
            yield number, {}, problem
        elif line.strip():
            yield number, *parse_row(line, kind)

# %% [markdown]
# Plain text has no lines of its own kind: a novel is broken where the page ended. There, a document is a few paragraphs.
# A document closes at the first blank line after 2,000 characters, and in a text without blank lines after 8,000.

# %% id="data-txt"
#| export
def text_rows(path: Path, kind: str, size: int = 2000) -> Numbered:
    """Documents of a plain text: paragraphs, packed until they have `size` characters.

    A paragraph that does not end within four times that size is cut at a line end.
    """
    block, start, length = [], 1, 0
    for number, line, problem in numbered_lines(path):
        if problem is None and kind not in ("pretrain", "evals"):
            problem = ("plain text where chats are expected: one line each, "
                       f"such as {EXAMPLES[kind]}")
        if problem:
            yield number, {}, problem
            continue
        if block and (length >= 4 * size or (length >= size and not line.strip())):
            yield start, {"text": "\n".join(block).strip()}, None
            block, length = [], 0
        if line.strip() or block:
            start = start if block else number
            block.append(line)
            length += len(line) + 1
    if block:
        yield start, {"text": "\n".join(block).strip()}, None

# %% [markdown]
# Parquet is what data hubs store: tables, column by column, compressed. It and Hugging Face's `datasets` are read where
# their packages are installed; without them the message says what to install.

# %% id="data-needs"
#| export
def needs(package: str, purpose: str):
    """Imports an optional package, or says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        why = f"{purpose} needs the package {name}: pip install {name}"
        raise DataError(why) from None

# %% [markdown]
# A table gives every message every key, with None where it has none. Those must go again, or a user's message would seem
# to hold a tool call.

# %% id="data-without-nones"
#| export
def without_nones(value):
    """The same value without keys that hold None, at any depth."""
    if isinstance(value, dict):
        return {key: without_nones(v) for key, v in value.items() if v is not None}
    return [without_nones(v) for v in value] if isinstance(value, list) else value

# %% [markdown]
# A Parquet file is read a few hundred rows at a time. It has no lines, so a problem is given with the number of
# its row. What `pyarrow` raises for a damaged file is an OSError or a ValueError.

# %% id="data-parquet"
#| export
def parquet_rows(path: Path, kind: str) -> Numbered:
    """Rows of a Parquet file, a batch at a time; the row stands for the line."""
    parquet, number = needs("pyarrow.parquet", f"reading {path}"), 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in map(without_nones, batch.to_pylist()):
                number += 1
                yield number, row, row_problem(row, kind)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        yield number + 1, {}, f"broken Parquet ({why}): fetch the file again"

# %% [markdown]
# A data set of Hugging Face is a folder on your disk, or a name on the hub. From the hub, rows are streamed: nothing is
# downloaded beyond what is read.

# %% id="data-open-dataset"
#| export
def open_dataset(datasets, source: str) -> Iterable[dict]:
    """Rows of a folder of `save_to_disk`, or of `hf:owner/name[:split]` on the hub."""
    if source.startswith("hf:"):
        name, _, split = source[3:].partition(":")
        return datasets.load_dataset(name, split=split or "train", streaming=True)
    rows = datasets.load_from_disk(source)
    return rows["train"] if isinstance(rows, dict) else rows

# %% [markdown]
# What the library raises when a name is wrong or the network is gone becomes a `DataError` like all others.

# %% id="data-datasets"
#| export
def dataset_rows(source: str, kind: str) -> Numbered:
    """Rows of a Hugging Face data set, each with its number and its problem."""
    datasets = needs("datasets", f"reading {source}")
    theirs = datasets.exceptions.DatasetsError
    try:
        rows = map(without_nones, open_dataset(datasets, source))
        for number, row in enumerate(rows, 1):
            yield number, row, row_problem(row, kind)
    except (OSError, ValueError, KeyError, RuntimeError, theirs) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{source}: the data set cannot be read ({why})") from error

# %% [markdown]
# One function puts it together: a name, a folder or a hub address in, rows out, each with its place. The name of a file
# decides who reads it.

# %% id="data-reader-of"
#| export
READERS = {".jsonl": jsonl_rows, ".json": jsonl_rows, ".txt": text_rows,
           ".parquet": parquet_rows}


def reader_of(path: Path) -> Callable | None:
    """What reads this file, by its name; None if the name tells nothing."""
    return READERS.get(Path(path.name.lower().removesuffix(".gz")).suffix)

# %% [markdown]
# Files of a folder are read in the order of their names, on every machine. A name that is wrong tells where it was looked
# for, since the usual mistake is to start in another folder.

# %% id="data-files"
#| export
def data_files(source: str | Path) -> list[Path]:
    """The files of `source` in a fixed order: itself, or all below the folder."""
    path, known = Path(source), ", ".join(READERS)
    if not path.exists():
        where = f"looked for it from {Path.cwd()}"
        raise DataError(f"{path}: there is no such file or folder ({where})")
    if path.is_file() and reader_of(path) is None:
        problem = "unknown kind of file"
        raise DataError(f"{path}: {problem}; known are {known}, also with .gz")
    below = sorted(p for p in path.rglob("*") if not p.name.startswith("."))
    files = [path] if path.is_file() else [p for p in below if p.is_file()]
    if not any(map(reader_of, files)):
        problem = "no file in this folder can be read"
        raise DataError(f"{path}: {problem}; known are {known}, and .gz")
    return files

# %% [markdown]
# A folder that `datasets` saved looks like any other, but for one small file in it.

# %% id="data-is-saved-dataset"
#| export
def is_saved_dataset(source: str | Path) -> bool:
    """Whether a folder was made by `save_to_disk` of Hugging Face's `datasets`."""
    marks = ("state.json", "dataset_dict.json")
    return any((Path(source) / name).is_file() for name in marks)

# %% [markdown]
# An empty file is a problem as well. Nobody makes one on purpose, and a run that quietly trains on the other
# files has lost data.

# %% id="data-rows"
#| export
def data_rows(source: str | Path, kind: str) -> Iterator[tuple]:
    """(file, line, row, problem) of a file, a folder or a Hugging Face data set."""
    if str(source).startswith("hf:") or is_saved_dataset(source):
        for number, row, problem in dataset_rows(str(source), kind):
            yield str(source), number, row, problem
        return
    for path in filter(reader_of, data_files(source)):
        number = 0
        for number, row, problem in reader_of(path)(path, kind):
            yield str(path), number, row, problem
        if number == 0:
            yield str(path), 1, {}, "the file is empty: fill it or take it away"

# %% [markdown]
# The same three texts in three forms must read the same.

# %% id="data-formats"
import pyarrow
import pyarrow.parquet

texts = ["Tilda lives in Oakham.", "In Oakham lives Tilda.", "Tilda comes from Oakham."]
forms = chapter.work / "forms"
forms.mkdir(exist_ok=True)
lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
(forms / "a.jsonl").write_text(lines)
(forms / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
pyarrow.parquet.write_table(pyarrow.table({"text": texts}), forms / "c.parquet")

# %% [markdown]
# Read as lines, as gzip and as a table:

# %% id="data-formats-same"
read = [row["text"] for _, _, row, _ in data_rows(forms, "pretrain")]
assert read == 3 * texts

# %% [markdown]
# ### All bad lines at once
#
# A report of one error a run is a slow conversation. `check_file` reads everything and tells of everything: the first
# 20 problems in full, then the numbers of all other bad lines. Neighbours are kept as a span: 41, 42, 43 as 41-43. So a
# file of nothing but bad lines needs no memory.

# %% id="data-problems"
#| export
class Problems:
    """Collects what is wrong: the first 20 in full, the line numbers of all."""

    def __init__(self):
        self.count, self.full, self.lines = 0, [], {}

    def add(self, file: str, line: int, problem: str) -> None:
        self.count += 1
        if self.count <= 20:
            self.full.append(f"{file}:{line}: {problem}")
            return
        spans = self.lines.setdefault(file, [])
        if spans and spans[-1][1] == line - 1:
            spans[-1][1] = line
        else:
            spans.append([line, line])

    def __str__(self) -> str:
        rest = []
        for file, spans in self.lines.items():
            numbers = (f"{a}-{b}" if b > a else str(a) for a, b in spans)
            rest.append(f"{file}: also lines {', '.join(numbers)}")
        bad = f"{self.count:,} bad line{'s' * (self.count != 1)}"
        total = f"{bad}; nothing was written. Repair or remove, then start again."
        return "\n".join([*self.full, *rest, total])

# %% [markdown]
# With that, checking is a loop. Note that it never keeps a row: checking 100 GB takes time, not memory.

# %% id="data-check"
#| export
def check_file(source: str | Path, kind: str) -> int:
    """The number of rows of a source, all read; DataError lists every bad line."""
    problems, count = Problems(), 0
    for file, line, _, problem in data_rows(source, kind):
        count += 1
        if problem:
            problems.add(file, line, problem)
    if problems.count:
        raise DataError(str(problems))
    return count

# %% [markdown]
# Here is a file that has been through a lot: cut, renamed, in another encoding, and with fifteen lines of question marks
# at the end.

# %% id="data-bad-file"
bad = chapter.work / "bad.jsonl"
_ = bad.write_bytes(b"\n".join([
    b'{"text": "Tilda lives in Oakham."}', b'{"text": "Tilda lives',
    b'{"txt": "Tilda"}', b'["Tilda"]', b'{"text": ""}', b'{"text": "caf\xe9"}',
    b'{"text": "a\0b"}', b'{"text": 7}',
    b'{"text": "' + b"x" * 9_000_000 + b'"}', *[b"?"] * 15,
]))

# %% [markdown]
# **Predict** how many of the 24 lines are good, then check.

# %% id="data-bad-file-check"
try:
    check_file(bad, "pretrain")
except DataError as error:
    report = str(error).replace(f"{chapter.work}{os.sep}", "").splitlines()
print(*report[:9], "...", *report[-2:], sep="\n")
assert len(report) == 22 and report[-2] == "bad.jsonl: also lines 22-24"

# %% [markdown]
# Eight kinds of damage and fifteen question marks, each with its line and its cure; one line is good. The readers that the
# other chapters call use the same check: at the first bad line they check the rest and list all.

# %% id="data-readers"
#| export
def good_rows(source: str | Path, kind: str) -> Iterator[dict]:
    """The rows in order. At a bad line the rest is checked too; DataError lists all."""
    for file, line, row, problem in data_rows(source, kind):
        if problem:
            check_file(source, kind)
            raise DataError(f"{file}:{line}: {problem}")  # when the check saw none
        yield row

# %% [markdown]
# Three names for it, one for each kind. They are what you will meet in later chapters.

# %% id="data-read"
#| export
def read_texts(source: str | Path) -> Iterator[str]:
    """Texts of .jsonl, .txt (both also .gz), .parquet, a folder, or a data set."""
    return (row["text"] for row in good_rows(source, "pretrain"))


def read_conversations(source: str | Path) -> Iterator[dict]:
    """Rows {"conversations": [{"role", "content"}, ...], ...} of the same files."""
    return good_rows(source, "sft")


def read_preferences(source: str | Path) -> Iterator[dict]:
    """Rows {"chosen": [...], "rejected": [...]} of the same kinds of files."""
    return good_rows(source, "dpo")

# %% [markdown]
# ## 1.3 Cleaning: one spelling for one text
#
# Two texts can look the same and differ for a computer. Here are two.

# %% id="data-twins"
left, right = "Caf\u00e9 Oakham", "Cafe\u0301\u00a0Oak\u00adham"
print(left, "|", right, "|", left == right)
print([f"{ord(c):x}" for c in left], [f"{ord(c):x}" for c in right], sep="\n")

# %% [markdown]
# The second spells é as e and an accent, and hides a no-break space (a0) and a soft hyphen (ad). A model would have to
# learn both spellings. `clean` makes them one, and touches nothing that carries meaning: line breaks, the indents of code,
# the joiners inside emoji (`\u200d`, which is missing from the invisible signs on purpose). `NFC` is the form of Unicode in
# which a letter and its accent are one character.

# %% id="data-clean"
#| export
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\ufeff]")


def clean(text: str) -> str:
    """The text in one spelling: line ends, Unicode form, spaces. Twice is as once."""
    text = re.sub("\r\n?|\u2028|\u2029", "\n", text).replace("\xa0", " ")
    text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    text = re.sub(r"(?<=\S)[ \t]{2,}(?=\S)", " ", text)  # keep indents
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()

# %% [markdown]
# Three promises, each with its case: equal look gives equal text, code keeps its indents, and an emoji made of
# two characters with a joiner (a woman and a rocket, shown as one astronaut) stays whole.

# %% id="data-clean-try"
assert clean(left) == clean(right) == "Café Oakham"
assert clean("if x:\r\n    y  =  1   \r\n") == "if x:\n    y = 1"
astronaut = "\U0001f469\u200d\U0001f680"
assert clean(astronaut) == astronaut

# %% [markdown]
# A cleaner that changes its own output would make every later comparison depend on how often it ran. So cleaning twice
# must be cleaning once. The tests of the course try that on thousands of random strings; here are a few hundred.

# %% id="data-clean-twice"
rng = random.Random(0)
alphabet = "ab \t\n\r\u00a0\u200b\u0301e\u00ad\u2028.\x07"
for _ in range(300):
    once = clean("".join(rng.choices(alphabet, k=12)))
    assert clean(once) == once

# %% [markdown]
# **Exercise 1.1 (20 min, ★★): `clean`** in [workbook 1](../exercises/01_data.ipynb). Write it from its seven rules; the check tries hidden signs, indents and emoji, and cleans twice.
#
# ## 1.4 Copies
#
# Web text is full of copies. They cost steps, and a text seen many times is recited word for word (Lee et al.
# 2022). Comparing each text with each other is hopeless: a million texts make 500 billion pairs. A *hash* makes it one look
# into a table: a short number computed from the text, equal for equal texts, and for different ones different but for a
# chance of $2^{-64}$ among four billion texts.

# %% id="data-fingerprint"
#| export
def fingerprint(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

# %% [markdown]
# With it, finding copies is a loop with a dictionary. It holds 16 bytes for each text and not the text.

# %% id="data-exact"
#| export
def exact_duplicates(texts: Iterable[str]) -> list[tuple[int, int]]:
    """Pairs (first, later) of positions that hold the same text."""
    first, pairs = {}, []
    for i, text in enumerate(texts):
        original = first.setdefault(fingerprint(text), i)
        if original != i:
            pairs.append((original, i))
    return pairs

# %% [markdown]
# Does it find them? Nobody knows how many copies web text holds, but we can plant some. Take documents that have no copy,
# and add a hundred.

# %% id="data-exact-plant"
texts = world.documents(chapter.size.planted_from, seed=3)
originals = list(dict.fromkeys(text for text in texts if len(text) > 100))
planted = rng.sample(range(len(originals)), 100)
copies = [originals[i] for i in planted]
truth = set(range(len(originals), len(originals) + 100))

# %% [markdown]
# *Precision* is the share of what was found that is right, *recall* the share of what was planted that was found. For exact
# copies, a hash has precision 1 and recall 1: all hundred, and nothing else.

# %% id="data-exact-planted"
found = {later for _, later in exact_duplicates(originals + copies)}
assert found == truth
len(originals), len(found)

# %% [markdown]
# But one changed letter is enough to get past it.

# %% id="data-exact-fooled"
assert exact_duplicates(["Tilda lives in Oakham.", "Tilda lives in Oakham!"]) == []

# %% [markdown]
# **Exercise 1.2 (10 min, ★): `copies`** in [workbook 1](../exercises/01_data.ipynb). Write `fingerprint` and `exact_duplicates` without looking.
#
# ## 1.5 Near copies
#
# How alike are two texts? Cut each into pieces of five characters, its *shingles*. They overlap as roof tiles do: the text
# `Tilda l` gives `Tilda`, `ilda ` and `lda l`.

# %% id="data-shingles"
#| export
def shingles(text: str, size: int = 5) -> set[str]:
    """All pieces of `size` characters of a text; the text itself if it is shorter."""
    return {text[i : i + size] for i in range(max(1, len(text) - size + 1))}

# %% [markdown]
# The share of pieces that both texts have, out of the pieces that either has, is their *Jaccard similarity*:
# $J(A, B) = |A \cap B| / |A \cup B|$. It is 1 for equal sets and 0 for sets that share nothing.

# %% id="data-jaccard"
def jaccard(A: set[str], B: set[str]) -> float:
    return len(A & B) / len(A | B)

# %% [markdown]
# **Predict:** two sentences of 22 characters differ in one letter in the middle. How alike are they?

# %% id="data-jaccard-try"
A, B = shingles("Tilda lives in Oakham."), shingles("Tilda lived in Oakham.")
J = jaccard(A, B)
print(sorted(A - B), sorted(B - A), f"J = {len(A & B)} / {len(A | B)} = {J:.2f}")

# %% [markdown]
# One letter changed, and five pieces of eighteen differ: every piece that covers the letter. Short texts pay
# much for one change, long texts little.
#
# For a million texts these sets are as hopeless as before. **MinHash** (Broder 1997) shrinks each to a short *sketch*.
# Give every piece a random number, the same in all texts, and keep the smallest number of a set. A hash with a seed in front
# is such a number.

# %% id="data-minhash-smallest"
def smallest(pieces: set[str], seed: int) -> int:
    hashes = (fingerprint(f"{seed} {piece}") for piece in pieces)
    return min(int.from_bytes(number, "big") for number in hashes)

# %% [markdown]
# Two sets have the same smallest number exactly when the smallest of the union lies in both: with probability $J$. Repeat
# with other random numbers, and the share of agreements estimates $J$. With 400 of them:

# %% id="data-minhash-by-hand"
agreements = [smallest(A, seed) == smallest(B, seed) for seed in range(400)]
estimate = sum(agreements) / 400
print(f"J = {J:.3f}, estimated {estimate:.3f}")
assert abs(estimate - J) < 3 * (J * (1 - J) / 400) ** 0.5

# %% [markdown]
# The estimate is a mean of yes-or-no answers, so its error shrinks with the square root of their number. For the 128 that
# we will use it is at most 0.044. The package `datasketch` computes a sketch in one call.

# %% id="data-minhash-sketch"
from datasketch import MinHash

def sketch_of(text: str) -> MinHash:
    sketch = MinHash(num_perm=128)
    sketch.update_batch([piece.encode() for piece in shingles(text)])
    return sketch

# %% [markdown]
# Pairs with more and more words changed will show the error. This is how words are changed:

# %% id="data-edited"
def edited(text: str, share: float) -> str:
    """The text with about this share of its words, at least one, replaced."""
    words = text.split()
    for i in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[i] = rng.choice(["often", "maybe", "quite", "indeed", "also"])
    return " ".join(words)

# %% [markdown]
# Two hundred pairs from nearly the same to quite different, each with its exact similarity and its estimate. A difference
# of five times 0.044 would be a mistake and not chance.

# %% id="data-minhash-scatter"
pairs = [(text, edited(text, rng.random() ** 2)) for text in originals[:200]]
exact = [jaccard(shingles(a), shingles(b)) for a, b in pairs]
estimated = [sketch_of(a).jaccard(sketch_of(b)) for a, b in pairs]
assert max(abs(a - b) for a, b in zip(exact, estimated)) < 5 * 0.044

# %% [markdown]
# Drawn over each other, they should lie on the diagonal.

# %% id="data-minhash-scatter-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
ax.plot([0, 1], [0, 1], color="grey", lw=1)
ax.plot(exact, estimated, "o", ms=3)
ax.set(xlabel="Jaccard similarity of the shingles", ylabel="estimate, 128 hashes")
show(fig, "The estimate from 128 numbers follows the similarity of the whole texts.")

# %% [markdown]
# Sketches are short, but there are still 500 billion pairs. *Banding* finds the few that matter: cut a sketch into $b$
# bands of $r$ numbers and look up each band in a table. Two texts meet when they agree on all of at least one band. One band
# agrees with probability $J^r$, so none of them does with $(1 - J^r)^b$, and the two meet with probability
# $1 - (1 - J^r)^b$. In code, for a sketch of 128:

# %% id="data-bands"
def meet(J, r: int):
    return 1 - (1 - J**r) ** (128 // r)


assert meet(0.8, 5) > 0.999 and meet(0.2, 5) < 0.01

# %% [markdown]
# That curve is a switch, and $r$ and $b$ set where it turns: near $J = (1/b)^{1/r}$, which is 0.53 for 25 bands of 5.

# %% id="data-bands-figure"
import numpy as np

def draw_bands(r: int = 5):
    fig, ax = plt.subplots(figsize=(7, 2.8))
    J = np.linspace(0, 1, 200)
    for width in sorted({2, 5, 12, r}):
        label = f"{128 // width} bands of {width}"
        ax.plot(J, meet(J, width), label=label, lw=3 if width == r else 1.3)
    ax.set(xlabel="similarity J", ylabel="probability to meet")
    ax.legend()
    show(fig, "Wide bands let only similar texts meet; narrow ones, strangers too.")


draw_bands()

# %% [markdown]
# Move the slider where your notebook can show one: which band width would you choose to find texts with J above 0.8?

# %% id="data-bands-widget" tags=["widget"]
try:
    from ipywidgets import IntSlider, interact
    interact(draw_bands, r=IntSlider(5, 1, 16, description="band width"))
except ImportError:
    print("pip install ipywidgets shows a slider here")

# %% [markdown]
# `datasketch` has the tables too, as `MinHashLSH`. The texts that meet are then compared by their sketches, so a chance
# meeting costs a comparison and not a text. Bands miss some pairs that lie just above their threshold, so theirs is set
# lower than ours. And only a text that is kept can be the first of a pair: of five copies, one stays.

# %% id="data-near"
#| export
def near_duplicates(
    texts: Iterable[str], threshold: float = 0.7, permutations: int = 128
) -> list[tuple[int, int]]:
    """Pairs (first, later) of texts that are alike by `threshold` (Broder 1997).

    The estimate's standard error is at most 0.5 / sqrt(permutations): 0.044 for 128.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold - 0.1, num_perm=permutations)
    sketches, pairs = {}, []
    for i, text in enumerate(texts):
        sketch = MinHash(num_perm=permutations)
        sketch.update_batch([piece.encode() for piece in shingles(text)])
        met = index.query(sketch)
        alike = [j for j in met if sketch.jaccard(sketches[j]) >= threshold]
        if alike:
            pairs.append((min(alike), i))
        else:
            index.insert(i, sketch)
            sketches[i] = sketch
    return pairs

# %% [markdown]
# Now plant near copies, each with one word in thirty replaced, and count again. Our documents are short, so one word
# weighs much, and the threshold is 0.6 instead of the usual 0.7 or 0.8. A hash finds none of them.

# %% id="data-near-planted"
copies = [edited(originals[i], 1 / 30) for i in planted]
found = {later for _, later in near_duplicates(originals + copies, threshold=0.6)}
check("data/near_recall", len(found & truth) / len(truth))
check("data/near_precision", len(found & truth) / len(found))
assert not truth & {later for _, later in exact_duplicates(originals + copies)}

# %% [markdown]
# How close was it? The histogram shows the similarity of the planted pairs beside pairs of unrelated documents.

# %% id="data-near-alike"
alike = [sketch_of(originals[i]).jaccard(sketch_of(c)) for i, c in zip(planted, copies)]
neighbours = zip(originals[:400], originals[400:800])
strangers = [sketch_of(a).jaccard(sketch_of(b)) for a, b in neighbours]

# %% [markdown]
# The dotted line is the threshold.

# %% id="data-near-figure"
fig, ax = plt.subplots(figsize=(7, 2.6))
bins = {"bins": np.linspace(0, 1, 41), "density": True, "alpha": 0.8}
ax.hist(strangers, label="two documents", **bins)
ax.hist(alike, label="a document and its near copy", hatch="//", **bins)
ax.axvline(0.6, color="black", ls=":")
ax.set(xlabel="estimated similarity", ylabel="density")
ax.legend()
show(fig, "Unrelated documents share little, near copies most of their shingles.")

# %% [markdown]
# **Exercise 1.10 (25 min, ★★★): `candidates`** in [workbook 1](../exercises/01_data.ipynb). Write banding with tables, predict which share of the pairs meets, and measure the curve above.
#
# **Try it.** Replace one word in ten instead, and predict the recall from the histogram first. Which is the better repair: a lower threshold, or shingles of three characters?
#
# ## 1.6 Test questions in the training text
#
# A model that has read the exam does not show what it can do. The usual guard (Brown et al. 2020): drop a training text that shares
# a run of 13 words with a test text. Case and punctuation do not count, and a Chinese character is a word.

# %% id="data-word-runs"
#| export
def word_runs(text: str, size: int = 13) -> Iterator[int]:
    """Hashes of all runs of `size` words, without case and punctuation."""
    words = re.findall(r"[\u3400-\u9fff]|\w+", text.lower())
    for i in range(len(words) - size + 1):
        yield hash(" ".join(words[i : i + size]))

# %% [markdown]
# All runs of the exam go into one set; each run of a training text is looked up in it.

# %% id="data-overlap"
#| export
def overlapping(
    texts: Iterable[str], evaluation: Iterable[str], size: int = 13
) -> list[int]:
    """Positions of texts that share a run of `size` words with a test text."""
    known = {run for text in evaluation for run in word_runs(text, size)}
    runs = (word_runs(text, size) for text in texts)
    return [i for i, found in enumerate(runs) if not known.isdisjoint(found)]

# %% [markdown]
# Why 13? Plant 50 test texts inside longer training texts.

# %% id="data-overlap-plant"
tests = [text for text in world.documents(400, seed=4) if len(text.split()) >= 16][:50]
training = [text for text in originals[:1000] if text not in tests]
hidden = [f"{training[i]} {test} {training[i + 1]}" for i, test in enumerate(tests)]
wanted = set(range(len(training), len(training) + len(hidden)))

# %% [markdown]
# Then vary the length of the run. **Predict:** which of the two shares suffers when it is short, precision or recall?

# %% id="data-overlap-planted"
recalls, precisions, sizes = [], [], (3, 5, 8, 13, 20, 30)
for size in sizes:
    found = set(overlapping(training + hidden, tests, size))
    recalls.append(len(found & wanted) / len(wanted))
    precisions.append(len(found & wanted) / max(1, len(found)))
check("data/overlap_precision", precisions[3])
assert recalls[3] == 1 and precisions[3] > precisions[0]

# %% [markdown]
# Both shares against the length of the run:

# %% id="data-overlap-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
ax.plot(sizes, recalls, "o-", label="recall")
ax.plot(sizes, precisions, "s--", label="precision")
ax.set(xlabel="words in the run", ylabel="share", ylim=(0, 1.05))
ax.legend()
show(fig, "Short runs accuse innocent texts, long runs miss test texts; 13 miss none.")

# %% [markdown]
# At 13 words every planted text is found. Some innocent ones go too, because this world has set phrases of that length; natural
# text has fewer. Losing a few training texts is cheap. Testing on what was trained on is not, so the guard is
# set to find all.
#
# **Exercise 1.3 (15 min, ★★): `overlapping`** in [workbook 1](../exercises/01_data.ipynb). Find the texts that share a run of words with a test text; the check compares with a loop over letters.
#
# ## 1.7 A split that stays
#
# To see whether a model learned or memorised, you hold some texts back. Shuffle and cut is the first idea.

# %% id="data-split-shuffle"
def shuffled_split(texts: list[str], share: float = 0.1) -> set[str]:
    mixed = list(texts)
    random.Random(0).shuffle(mixed)
    return set(mixed[: round(share * len(texts))])

# %% [markdown]
# Then you add 200 texts and shuffle again. **Before you run this:** how many of the texts held back before are in the
# training part now?

# %% id="data-split-shuffle-moved"
more = originals + [f"{text} And so on." for text in originals[:200]]
before, after = shuffled_split(originals), shuffled_split(more)
moved_by_shuffle = len(before - after) / len(before)
round(moved_by_shuffle, 2)

# %% [markdown]
# Most of them: the next model reads what you will test it on, and its numbers cannot be compared with those from before. Let the
# text itself decide instead. Its hash is a number that looks random, and it is the same forever. If it lies in the lowest tenth, the text is held back.

# %% id="data-split"
#| export
def in_validation(text: str, share: float) -> bool:
    """Whether a text is held out; that depends on the text alone and never changes."""
    return int.from_bytes(fingerprint(text)[:8], "big") < share * 2**64

# %% [markdown]
# The same question put to the hash: of the texts held back before, how many are in training after 200 texts
# were added? None, and none can.

# %% id="data-split-moved"
before = {text for text in originals if in_validation(text, 0.1)}
after = {text for text in more if in_validation(text, 0.1)}
moved_by_hash = len(before - after) / len(before)
assert moved_by_hash == 0 and moved_by_shuffle > 0.5

# %% [markdown]
# The hash also sends all copies of a text to the same side, so no held-out text stands in the training part.
#
# **Exercise 1.4 (5 min, ★): `in_validation`** in [workbook 1](../exercises/01_data.ipynb). Write the rule; then think why a text that is held out at a share of 1% is held out at 5% too.
#
# **Exercise 1.8 (10 min, ★★): `split_clean`** in [workbook 1](../exercises/01_data.ipynb). A colleague's split leaks, and texts change sides when others are added. Find both bugs.

# %% [markdown]
# ## 1.8 Mixing by tokens
#
# How much of each kind should the model read? A mixture is a decision worth a file of its own.

# %% id="data-mixture-file"
recipe = chapter.root / "data" / "mixtures" / "people_first.yaml"
print(recipe.read_text())

# %% [markdown]
# The shares are of *tokens*, the units that a model reads. To count them you need a tokenizer, and chapter 02 builds one.
# Until then a byte is a token. Any tokenizer of this course has these three names: a token that ends a document, the number
# of different tokens, and a function from texts to lists of numbers.

# %% id="data-bytes"
#| export
class ByteTokenizer:
    """A byte is a token. It stands in until chapter 02 has a real tokenizer."""

    eos_id, vocab_size = 0, 257

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + 1 for byte in text.encode()] for text in texts]

# %% [markdown]
# Token 0 is kept for the end of a document, so byte 72, the letter H, is token 73. The é takes two bytes and
# therefore two tokens.

# %% id="data-bytes-try"
tokenizer = ByteTokenizer()
tokenizer.encode_batch(["Hi!", "é"])

# %% [markdown]
# In Python a mixture is a name, a path and a share for each source. Shares that do not sum to one are a slip of the pen, and
# nobody knows which was meant, so they are refused.

# %% id="data-mixture"
#| export
@dataclass(frozen=True)
class Mixture:
    """Sources of text, {name: (path, share)}; a share is one of tokens."""

    sources: dict[str, tuple[Path, float]]
    valid_share: float = 0.02

    def __post_init__(self):
        shares = [share for _, share in self.sources.values()]
        if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            wanted = "the shares must be above 0 and sum to 1"
            raise DataError(f"{wanted}, they sum to {sum(shares):g}")
        if not 0 < self.valid_share < 1:
            raise DataError(f"valid_share is {self.valid_share:g}, not between 0 and 1")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Mixture":
        """Reads a YAML file; the paths in it are relative to that file."""
        return read_mixture(Path(path))

# %% [markdown]
# Reading the file can fail in many ways: it is missing, is no YAML, lacks a key, or holds a word where a number should be.
# The reader of the message needs the same in all of them: the file, the reason, and an example of what was expected.

# %% id="data-read-mixture"
#| export
def read_mixture(path: Path) -> Mixture:
    """A mixture from YAML: `valid_share` and `sources: {name: {path, share}}`."""
    import yaml

    wrong = (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = given.pop("sources").items()
        sources = {n: (path.parent / e["path"], float(e["share"])) for n, e in entries}
        return Mixture(sources, **given)
    except wrong as error:
        why = f"{error} ({type(error).__name__})"
        form = "sources: {name: {path: FILE, share: NUMBER}} and valid_share: NUMBER"
        raise DataError(f"{path}: {why}; expected {form}") from error

# %% [markdown]
# First the tempting way to mix: pick a source with its share as probability, then a document of it, 5,000 times.

# %% id="data-mixture-load"
mixture = Mixture.from_yaml(recipe)
texts = {name: list(read_texts(path)) for name, (path, _) in mixture.sources.items()}
shares = {name: share for name, (_, share) in mixture.sources.items()}

# %% [markdown]
# **Predict:** `people` is to give 60% of the tokens. Its documents are short, those of `stories` long. Will it get more or
# less?

# %% id="data-mixture-wrong"
by_documents = Counter()
for name in rng.choices(list(shares), list(shares.values()), k=5000):
    by_documents[name] += len(rng.choice(texts[name]).encode()) + 1
{name: round(count / by_documents.total(), 3) for name, count in by_documents.items()}

# %% [markdown]
# Much less, about 40%, and the stories more than half: drawing *documents* by shares of *tokens* goes wrong when documents
# differ in length. Instead, count what was drawn and always take the next text from the source that is furthest behind. When
# a source runs out it starts again:

# %% id="data-endless"
#| export
def endless(source: Path, part: str, valid_share: float) -> Iterator[str]:
    """The texts of one part of a source, from the start again when they run out."""
    while True:
        found = False
        for text in read_texts(source):
            if in_validation(text, valid_share) == (part == "valid"):
                found = True
                yield text
        if not found:
            problem = f"{source}: no text falls into the {part} part"
            raise DataError(f"{problem}; give more texts or another valid_share")

# %% [markdown]
# A source is behind by share times total, minus what it gave. Since a step takes from the one furthest behind, no share is
# ever off by more than about a document, whatever the lengths.

# %% id="data-mixture-draw"
#| export
def draw(
    mixture: Mixture, tokenizer, tokens: int, part: str = "train"
) -> Iterator[tuple[str, str]]:
    """(source name, text) until `tokens` are drawn, from the source furthest behind."""
    share = {name: share for name, (_, share) in mixture.sources.items()}
    paths = {name: path for name, (path, _) in mixture.sources.items()}
    streams = {name: endless(paths[name], part, mixture.valid_share) for name in paths}
    drawn, total = dict.fromkeys(paths, 0), 0
    while total < tokens:
        name = max(paths, key=lambda name: share[name] * total - drawn[name])
        text = next(streams[name])
        size = len(tokenizer.encode_batch([text])[0]) + 1
        drawn[name] += size
        total += size
        yield name, text

# %% [markdown]
# A million tokens from sources that hold far fewer, so each is read many times. The error is that of the share that is
# furthest off.

# %% id="data-mixture-right"
def error(counts: Counter) -> float:
    return max(abs(counts[name] / counts.total() - shares[name]) for name in shares)


drawn, errors = Counter(), []
for name, text in draw(mixture, tokenizer, 1_000_000):
    drawn[name] += len(text.encode()) + 1
    errors.append((drawn.total(), error(drawn)))
_ = check("data/mixture_error", errors[-1][1])

# %% [markdown]
# The two ways side by side. Both axes are logarithmic, so a straight fall means: ten times the tokens, a tenth
# of the error.

# %% id="data-mixture-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
ax.loglog(*zip(*errors[2::20]), label="by tokens")
ax.axhline(error(by_documents), color="C1", ls="--", label="by documents, 5,000 draws")
ax.axhline(0.01, color="grey", ls=":", label="1%")
ax.set(xlabel="tokens drawn", ylabel="largest error of a share")
ax.legend()
show(fig, "Drawn by tokens, the shares come ever closer; by documents they stay off.")
assert errors[-1][1] < 0.01 < error(by_documents)

# %% [markdown]
# The same must hold in the part that is held out, or validation measures another mixture than training; `part="valid"`
# draws from it.
#
# **Exercise 1.5 (20 min, ★★): `draw_texts`** in [workbook 1](../exercises/01_data.ipynb). Write the mixture without files; the check wants every text from the source furthest behind.
#
# **Exercise 1.9 (10 min, ★): `scaled_shares`** in [workbook 1](../exercises/01_data.ipynb). Shares by size starve small sources. Scale them as XLM-R did (Conneau et al. 2020), and see how often each source is repeated.
#
# ## 1.9 Tokens on disk
#
# A list of Python integers is the obvious place for tokens. What does a token cost there?

# %% id="data-list-cost"
import sys

ids = tokenizer.encode_batch([" ".join(originals[:100])])[0]
sys.getsizeof(ids) / len(ids), np.array(ids, np.uint16).nbytes / len(ids)

# %% [markdown]
# Eight bytes for a reference, against two for the number itself, which are enough for vocabularies up to 65,536. And the list must be
# in memory as a whole. On disk, tokens are a long row of two-byte numbers; we cut it into files, *shards*, and remember
# where each document starts.
#
# Half a folder is worse than none, since nobody sees that it is half. So we write into a temporary folder beside the real
# one, and rename it when it is whole: a rename happens at once or not at all.

# %% id="data-new-folder"
#| export
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, file too large


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without error."""
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in FULL:
            raise
        cure = "nothing was kept. Make room, then start again."
        raise DataError(f"{folder}: the disk is full; {cure}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

# %% [markdown]
# A tokenizer works faster on many texts at once, and memory is spent on as many as are in flight. The group is
# measured in characters, since a thousand tweets and a thousand novels are not the same thing.

# %% id="data-batches"
#| export
def batches(texts: Iterable[str], characters: int = 250_000) -> Iterator[list[str]]:
    """Texts in groups of about `characters`."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group

# %% [markdown]
# The writer keeps three counters and no text. `np.split` cuts a group of tokens where a file is full; a
# document may well lie across two files. `documents.bin` holds where each document ends, as eight-byte numbers, with a zero
# in front: so document $i$ lies between numbers $i$ and $i + 1$.

# %% id="data-shard-writer"
#| export
class ShardWriter:
    """Appends tokens to shard_00000.bin, ... and remembers where each document ends."""

    def __init__(self, folder: Path, tokenizer, shard_tokens: int):
        self.folder, self.tokenizer, self.shard_tokens = folder, tokenizer, shard_tokens
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.tokens = self.documents = self.num_bytes = 0
        (folder / "documents.bin").write_bytes(np.int64(0).tobytes())

    def add(self, texts: list[str]) -> None:
        eos = [self.tokenizer.eos_id]
        lists = [ids + eos for ids in self.tokenizer.encode_batch(texts)]
        ends = self.tokens + np.cumsum([len(ids) for ids in lists], dtype="<i8")
        with open(self.folder / "documents.bin", "ab") as file:
            file.write(ends.tobytes())
        self.append(np.concatenate([np.array(ids, self.dtype) for ids in lists]))
        self.documents += len(texts)
        self.num_bytes += sum(len(text.encode()) for text in texts)

    def append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            shard, used = divmod(self.tokens, self.shard_tokens)
            piece, tokens = np.split(tokens, [self.shard_tokens - used])
            with open(self.folder / f"shard_{shard:05d}.bin", "ab") as file:
                file.write(piece.tobytes())
            self.tokens += len(piece)

# %% [markdown]
# Around it goes the temporary folder, and the index is written last. A shard holds 16 million tokens unless you say
# otherwise.

# %% id="data-write-shards"
#| export
def write_shards(
    texts: Iterable[str], tokenizer, folder: str | Path, shard_tokens: int = 2**24
) -> "TokenShards":
    """Tokenises texts into files of `shard_tokens` tokens, a few hundred at a time.

    `tokenizer` has `encode_batch`, `eos_id` (put after each text) and `vocab_size`: 2
    bytes a token up to 65,536, else 4. DataError: no text, or the disk is full.
    """
    with new_folder(folder) as new:
        writer = ShardWriter(new, tokenizer, shard_tokens)
        for group in batches(texts):
            writer.add(group)
        if not writer.documents:
            raise DataError(f"{folder}: there is no text to write")
        names = ("tokens", "documents", "num_bytes", "shard_tokens")
        index = {name: getattr(writer, name) for name in names}
        index["dtype"] = writer.dtype.str
        (new / "index.json").write_text(json.dumps(index) + "\n")
    return TokenShards(folder)

# %% [markdown]
# To read, `np.memmap` makes a file look like an array. Nothing is loaded until you touch it; then the operating system
# brings in the pages you touch, and throws them out when memory is short. Opening compares the size of the file with the
# index. That costs microseconds, and it is the only moment at which a copy that stopped half-way can be noticed.

# %% id="data-mapped"
#| export
def mapped(path: Path, dtype, length: int) -> np.ndarray:
    """A file as an array, not loaded; DataError if it is not `length` numbers long."""
    wanted = length * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != wanted:
        problem = f"{found:,} bytes, the index says {wanted:,}"
        raise DataError(f"{path}: {problem}: write or copy the folder again")
    return np.memmap(path, dtype, "r", shape=(length,))

# %% [markdown]
# Several files must read like one. For a number, find its file by the place where each starts. For a slice, cut it out of
# each file; most slices lie in one file and cost no copy.

# %% id="data-joined"
#| export
class JoinedArray:
    """Memory-mapped files that read like one 1-D array: `len(a)`, `a[7]`, `a[3:9]`."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.dtype = parts, parts[0].dtype
        self.starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, where):
        if not isinstance(where, slice):
            i = range(len(self))[where]  # negative numbers and IndexError as for a list
            part = int(np.searchsorted(self.starts, i, "right")) - 1
            return int(self.parts[part][i - self.starts[part]])
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise IndexError("slices with a step are not supported: "
                             "take a plain slice first, then [::step]")
        pairs = zip(self.parts, self.starts)
        pieces = [part[max(0, start - a) : max(0, stop - a)] for part, a in pairs]
        pieces = [piece for piece in pieces if len(piece)] or [self.parts[0][:0]]
        return np.asarray(pieces[0]) if len(pieces) == 1 else np.concatenate(pieces)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)

# %% [markdown]
# The folder as an object: `tokens` is the long row, and item $i$ is document $i$.

# %% id="data-token-shards"
#| export
class TokenShards:
    """A folder of `write_shards`, mapped into memory and not loaded.

    `tokens`: 1-D, with `len` and slices. `documents`: where each starts, and the end,
    (documents + 1,). `num_bytes`: UTF-8 bytes of the text. DataError if damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            why = "no index.json here, so no token shards"
            raise DataError(f"{folder}: {why}; make them with write_shards")
        index = json.loads((self.folder / "index.json").read_text())
        self.num_bytes, self.dtype = index["num_bytes"], np.dtype(index["dtype"])
        ends, size = index["documents"] + 1, index["shard_tokens"]
        self.documents = mapped(self.folder / "documents.bin", "<i8", ends)
        total = index["tokens"]
        lengths = [min(size, total - start) for start in range(0, total, size)]
        self.tokens = JoinedArray([
            mapped(self.folder / f"shard_{i:05d}.bin", self.dtype, length)
            for i, length in enumerate(lengths)
        ])

    def __len__(self) -> int:
        return len(self.documents) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """The tokens of document i, with its closing eos."""
        i = range(len(self))[i]
        return self.tokens[int(self.documents[i]) : int(self.documents[i + 1])]

# %% [markdown]
# Write the documents as bytes into shards of 40,000 tokens, so that documents lie across the cuts.

# %% id="data-shards-try"
shards = write_shards(originals, tokenizer, chapter.work / "shards", 40_000)
print(sorted(path.name for path in shards.folder.iterdir())[-3:])
print(len(shards), "documents,", len(shards.tokens), "tokens")

# %% [markdown]
# Read back, every document must be itself, and the count must be that of the bytes, plus one *eos* (the token that ends a
# document) for each.

# %% id="data-shards-check"
back = [(ids[:-1] - 1).astype(np.uint8).tobytes().decode() for ids in shards]
assert back == originals
assert len(shards.tokens) == shards.num_bytes + len(shards)

# %% [markdown]
# ### The measurement
#
# The claim: memory stays flat, whatever the size of the text. A process of its own tokenises a file and then reads 2,000
# windows from the result; the number is the most memory that it ever held.

# %% id="data-memory"
import subprocess

def peak(way: str, megabytes: float) -> float:
    command = [sys.executable, "-m", "course.shard_memory", "--way", way]
    command += ["--megabytes", str(megabytes)]
    done = subprocess.run(command, cwd=chapter.root, capture_output=True, check=True)
    return json.loads(done.stdout)["peak_bytes"] / 1e6

# %% [markdown]
# Beside it, the same with one list. **Before you run it:** which of the two will be flat, and at what height? The list is
# there to show that the measurement does see memory that grows.

# %% id="data-memory-run"
sizes = list(chapter.size.megabytes)
memory = {way: [round(peak(way, mb), 1) for mb in sizes] for way in ("list", "shards")}
assert memory["list"][-1] > 1.3 * memory["list"][0]
memory

# %% [markdown]
# Draw the two lines, and hold the claim against its band.

# %% id="data-memory-figure"
fig, ax = plt.subplots(figsize=(7, 2.8))
ax.plot(sizes, memory["list"], "o-", label="one list")
ax.plot(sizes, memory["shards"], "s--", label="shards")
ax.set(xlabel="text (MB)", ylabel="peak memory (MB)", ylim=(0, None))
ax.legend()
show(fig, "With one list, memory grows with the text; with shards it stays the same.")
check("data/shard_memory_growth", memory["shards"][-1] / memory["shards"][0])
_ = check("data/shard_memory_bytes", max(memory["shards"]) * 1e6)

# %% [markdown]
# Does it hold further out? Measured once, in the same way, on one processor core: 1,000 MB of text with the tokenizer that
# chapter 02 trains (vocabulary 2,048) gave 248 million tokens in 434 seconds, with a peak of 53 MB, 42 of which
# Python and its libraries had taken before the first line was read. To repeat it, for which you need 2 GB of free disk:
#
#     python -m course.shard_memory --megabytes 1000 --tokenizer FOLDER
#
# **Exercise 1.6 (25 min, ★★★): `JoinedArray`** in [workbook 1](../exercises/01_data.ipynb). Write the two methods that make many files read like one; the check compares with NumPy.
#
# **Exercise 1.7 (10 min, ★): `predicted_folder`** in [workbook 1](../exercises/01_data.ipynb). Work out on paper how many files and bytes a corpus takes.

# %% [markdown]
# ## 1.10 Where it breaks
#
# **Removing copies after a shuffled split.** Half of the texts stand there twice. Shuffle, split, and then remove the copies
# in each part. Each part is free of copies, and yet the held-out part stands in the training part.

# %% id="data-break-leak"
doubled = list(enumerate(originals + originals[: len(originals) // 2]))
held = shuffled_split(doubled)
train = {text for number, text in doubled if (number, text) not in held}
leaked = sum(text in train for _, text in held) / len(held)
f"{leaked:.0%} of the held-out texts are in the training part"

# %% [markdown]
# Deciding by the hash, or removing copies first, makes this zero. If your validation loss is suspiciously good, look
# here first.

# %% id="data-break-leak-hash"
held = {text for _, text in doubled if in_validation(text, 0.1)}
train = {text for _, text in doubled if not in_validation(text, 0.1)}
assert leaked > 0.3 and not held & train

# %% [markdown]
# **A copy that was cut off.** A shard that lost its end is still a valid row of numbers. Only the index knows.

# %% id="data-break-shard"
os.truncate(sorted(shards.folder.glob("shard_*"))[0], 1000)
try:
    TokenShards(shards.folder)
except DataError as problem:
    print(str(problem).replace(f"{chapter.work}{os.sep}", ""))
    assert "the index says" in str(problem)

# %% [markdown]
# ## 1.11 The folder that the other chapters read
#
# What is left is plumbing: take the world, a file, or a folder with `pretrain/`, `sft/`, `dpo/` and `evals/`; check all of it;
# clean, drop copies and test questions, split; write. A stage that your folder lacks takes the world's data and says so.
#
# Writing first. The same rows must give the same bytes, or nobody could tell by a checksum whether two runs read the same
# data. gzip puts the time of day into its header; `mtime=0` keeps it out.

# %% id="data-line-writer"
#| export
@contextmanager
def line_writer(path: Path) -> Iterator[Callable[[dict], None]]:
    """A function that writes one row a line, as gzip if the name ends in .gz."""
    with open(path, "wb") as raw:
        gz = path.name.endswith(".gz")
        opened = gzip.GzipFile("", "wb", 6, raw, mtime=0) if gz else nullcontext(raw)
        with opened as file:
            line = lambda row: json.dumps(row, ensure_ascii=False) + "\n"
            yield lambda row: file.write(line(row).encode())

# %% [markdown]
# A whole list of rows at once:

# %% id="data-write-jsonl"
#| export
def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Writes rows to a .jsonl or .jsonl.gz file and returns their number."""
    count = 0
    with line_writer(Path(path)) as write:
        for row in rows:
            write(row)
            count += 1
    return count

# %% [markdown]
# Both parts are written in one pass, each row going where its hash sends it. For a chat the hash is taken of
# the whole chat.

# %% id="data-key-of"
#| export
def key_of(row: dict) -> str:
    """What decides about copies and the split: the text, or the whole chat."""
    if "text" in row:
        return row["text"]
    return json.dumps(row, ensure_ascii=False, sort_keys=True)

# %% [markdown]
# One row in fifty is held back, and more if few are expected: three held-out texts measure nothing.

# %% id="data-write-parts"
#| export
def write_parts(rows: Iterable[dict], folder: Path, expected: int) -> dict[str, int]:
    """Writes train.jsonl.gz and valid.jsonl.gz; returns the number of rows in each."""
    folder.mkdir(parents=True)
    share, counts = max(0.02, min(0.5, 20 / expected)), {"train": 0, "valid": 0}
    train, valid = (line_writer(folder / f"{part}.jsonl.gz") for part in counts)
    with train as write_train, valid as write_valid:
        for row in rows:
            held_out = in_validation(key_of(row), share)
            (write_valid if held_out else write_train)(row)
            counts["valid" if held_out else "train"] += 1
    if min(counts.values()) == 0:
        few = f"{sum(counts.values())} different rows are too few to hold some back"
        raise DataError(f"{folder.name}: {few}; give 20 or more")
    return counts

# %% [markdown]
# A test question can hide in any field of a row, so all strings are looked at.

# %% id="data-strings"
#| export
def strings(value) -> Iterator[str]:
    """Every string in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)

# %% [markdown]
# Cleaning, copies and test questions are dealt with in the same pass. What is left out is counted, so that the
# numbers add up: rows read = training + held out + copies + test questions.

# %% id="data-select"
#| export
def select_rows(
    rows: Iterable[dict], known: set[int], removed: dict[str, int]
) -> Iterator[dict]:
    """Cleans texts, leaves out copies and test texts, and counts both in `removed`."""
    seen = set()
    for row in rows:
        row = {"text": clean(row["text"])} if "text" in row else row
        key = fingerprint(key_of(row))
        if key in seen:
            removed["duplicates"] += 1
        elif any(not known.isdisjoint(word_runs(text)) for text in strings(row)):
            removed["in_evaluation"] += 1
        else:
            seen.add(key)
            yield row

# %% [markdown]
# A name becomes a list of stages: nothing for the world; a file is pretraining text; a folder may have a folder for each
# kind.

# %% id="data-stages"
#| export
def stage_sources(source: str | Path | None) -> dict[str, str | Path]:
    """Which stage reads what: {} for the world, else {"pretrain": path, ...}."""
    if source in (None, "", "world"):
        return {}
    if str(source).startswith("hf:"):
        return {"pretrain": str(source)}
    folders = {stage: Path(source) / stage for stage in KEYS}
    found = {stage: folder for stage, folder in folders.items() if folder.is_dir()}
    return found or {"pretrain": Path(source)}

# %% [markdown]
# All files of all stages are checked before the first byte is written, and all complaints come together.

# %% id="data-check-stages"
#| export
def check_stages(sources: dict[str, str | Path]) -> dict[str, int]:
    """The number of rows of each stage; one DataError tells of every bad line."""
    counts, problems = {}, []
    for stage, path in sources.items():
        try:
            counts[stage] = check_file(path, stage)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return counts

# %% [markdown]
# What the source does not bring is taken from the world.

# %% id="data-world-rows"
#| export
def world_rows(world, stage: str, sizes: dict) -> tuple[Iterator[dict], int]:
    """The world's rows for "pretrain" or "sft", and how many they are."""
    count = sizes["documents"]
    if stage == "pretrain":
        return ({"text": text} for text in world.documents(count, 1)), count
    count = sizes.get("conversations", max(1000, count // 10))
    return ({"conversations": chat} for chat in world.conversations(count, 1)), count

# %% [markdown]
# Facts and questions are written only where they fit the text: nobody should be asked about Tilda who has read Jane Austen.

# %% id="data-write-world"
#| export
def write_world(folder: Path, sizes: dict, about: dict) -> None:
    """Adds the world's data for missing stages, and facts and questions that fit."""
    missing = [stage for stage in ("pretrain", "sft") if stage not in about["stages"]]
    if not missing:
        return
    world = make_world(sizes["people"], sizes.get("seed", 1))
    for stage in missing:
        rows, count = world_rows(world, stage, sizes)
        parts = write_parts(rows, folder / stage, count)
        about["stages"][stage] = {"source": "world", **parts}
        if about["source"] != "world":
            why = f"{about['source']} has no {stage}/"
            about["notes"].append(f"{why}: the world's data is used for it")
    if "pretrain" in missing:
        write_jsonl(folder / "facts.jsonl", world.facts())
    if missing == ["pretrain", "sft"]:
        write_jsonl(folder / "questions.jsonl", world.questions())

# %% [markdown]
# A file that no reader knows, such as a picture among the texts, is no error. It is named, so that nothing is left out in
# silence.

# %% id="data-unread"
#| export
def unread(sources: dict) -> list[Path]:
    """Files in the folders that no reader knows."""
    folders = (path for path in sources.values() if Path(path).is_dir())
    plain = [path for path in folders if not is_saved_dataset(path)]
    paths = (path for folder in plain for path in data_files(folder))
    return [path for path in paths if reader_of(path) is None]

# %% [markdown]
# One stage of your own data: read, select, write, and count.

# %% id="data-write-stage"
#| export
def write_stage(folder: Path, source, stage: str, count: int, known: set[int]) -> dict:
    """Writes one stage of `count` rows; returns what about.json says of it."""
    removed = {"duplicates": 0, "in_evaluation": 0}
    rows = select_rows(good_rows(source, stage), known, removed)
    parts = write_parts(rows, folder / stage, count)
    return {"source": str(source), "rows": count, **parts, **removed}

# %% [markdown]
# And the function that calls them all. What it did stands in `about.json`, beside the data.

# %% id="data-prepare"
#| export
def prepare(source: str | Path | None, folder: str | Path, world_sizes: dict) -> dict:
    """Makes the data folder that all later chapters read; returns its about.json.

    source: None or "world", a file or folder of pretraining text, a folder with
    pretrain/ sft/ dpo/ evals/, or "hf:owner/name". A stage that it lacks takes the
    world's data. DataError lists every bad line; then nothing is written.
    """
    sources = stage_sources(source)
    counts = check_stages(sources)
    exam = good_rows(sources["evals"], "evals") if "evals" in sources else []
    known = {run for row in exam for text in strings(row) for run in word_runs(text)}
    about = {"source": str(source or "world"), "stages": {}, "notes": []}
    with new_folder(folder) as new:
        for name in [name for name in ("pretrain", "sft", "dpo") if name in sources]:
            made = write_stage(new, sources[name], name, counts[name], known)
            about["stages"][name] = made
        write_world(new, world_sizes, about)
        reason = "was not read: unknown kind of file"
        about["notes"] += [f"{path} {reason}" for path in unread(sources)]
        print(*about["notes"], sep="\n", end="\n" * bool(about["notes"]))
        text = json.dumps(about, indent=1, ensure_ascii=False)
        (new / "about.json").write_text(text + "\n")
    return about

# %% [markdown]
# Other chapters that need nothing but the world call this:

# %% id="data-prepare-world"
#| export
def prepare_world(folder: str | Path, world_sizes: dict) -> dict:
    """`prepare` with the world; its sizes: people, documents, seed, conversations."""
    return prepare("world", folder, world_sizes)

# %% [markdown]
# Every later chapter starts from this folder. With `python -m course run --data FOLDER` it holds your own text.

# %% id="data-artifact"
with chapter.write("data") as folder:
    about = prepare(chapter.data, folder, chapter.world)
for stage, counts in about["stages"].items():
    print(stage, counts)
assert all(counts["train"] > counts["valid"] > 0 for counts in about["stages"].values())

# %% [markdown]
# The shipped samples are such a folder. One story stands there twice, and one text holds a text of `evals/`. Watch both go.

# %% id="data-sample"
sample = chapter.root / "data" / "sample"
about = prepare(sample, chapter.work / "sample", chapter.world)
part = about["stages"]["pretrain"]
assert part["duplicates"] == part["in_evaluation"] == 1
part

# %% [markdown]
# ## Recap
#
# - A world whose facts are known turns "the model seems to know" into a number.
# - All data is checked before anything trains; every bad line is named, and nothing is dropped in silence.
# - A hash finds exact copies, MinHash with banding near ones, runs of 13 words test questions.
# - The hash of a text decides its side of the split, forever; mixtures count tokens, not documents.
# - Tokens lie on disk in shards, mapped into memory: the peak stays the same for any amount of text.
#
# **Words for the glossary:** document, shingle, Jaccard similarity, MinHash, banding, precision, recall, contamination,
# held-out text, mixture, shard, memory map.
#
# **Exercises:** 1.1 to 1.10, in place above, with checks in [workbook 1](../exercises/01_data.ipynb).
#
# **Sources.** Broder 1997, *On the resemblance and containment of documents*. Lee et al. 2022, *Deduplicating training data
# makes language models better* (arXiv:2107.06499). Brown et al. 2020, appendix C (arXiv:2005.14165). Allen-Zhu and Li 2023,
# *Physics of language models 3.1* (arXiv:2309.14316). Eldan and Li 2023, *TinyStories* (arXiv:2305.07759), the forerunner of made-up worlds.
#
# **Next:** a byte is a poor token. Chapter 02 builds a better one.
