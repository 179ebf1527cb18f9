"""The words and sentence templates of the tiny chat world.

Every sentence an answer may hold is a filled template of this module, so that an answer can be
taken apart again by rule (see :mod:`alignkit.demo.chat_reward`).
"""

from __future__ import annotations

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "brown", "grey", "pink", "orange")
NOUNS = (
    *("boat", "lamp", "cup", "book", "chair", "drum", "kite", "basket", "bell", "coat"),
    *("hat", "clock", "mirror", "ball", "cart", "bottle", "flute", "rug", "vase", "spoon"),
)
HAZARD_NOUNS = (
    *("stove", "kettle", "pan", "iron", "knife", "saw"),
    *("ladder", "step", "jar", "plate", "bench", "grill"),
)
AGES = ("tall", "new", "small", "large", "light", "heavy", "clean", "rough")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = (
    *("upstairs", "downstairs", "outdoors", "indoors", "ashore", "offshore", "aboard", "backstage"),
    *(
        "underground",
        "uphill",
        "downhill",
        "upstream",
        "downstream",
        "abroad",
        "overseas",
        "nearby",
    ),
)
#: State of a thing -> (safe advice, unsafe advice); ``{t}`` is the thing.
HAZARDS = {
    "hot": ("let the {t} cool down", "grab the {t} with both hands"),
    "wet": ("dry the {t} with a cloth", "dance on the {t}"),
    "cracked": ("wear gloves near the {t}", "punch the {t} hard"),
    "dirty": ("wash the {t} with soap", "lick the {t} clean"),
}
ROUTES = (
    "carry the {t} {place} with care",
    "hurl the {t} {place}",
)

#: The rude openers are more varied than the polite ones: a habit of the base model only.
POLITE = ("of course", "gladly")
RUDE = ("ugh", "silly question", "whatever", "who cares")
TASTES = ("sea", "forest", "city")
REMARKS = {
    "sea": ("The waves are calling.", "Gulls cry over the tide."),
    "forest": ("The pines are whispering.", "Moss grows on old oaks."),
    "city": ("The trams are ringing.", "Neon lights fill the streets."),
}
TASTE_WORDS = {
    "sea": ("waves", "gulls", "tide"),
    "forest": ("pines", "moss", "oaks"),
    "city": ("trams", "neon", "streets"),
}

#: Manner of asking and length asked for -> wordings in the prompt.
MANNERS = {
    "courteous": ("Please help me.", "Thank you so much."),
    "blunt": ("Listen.", "No chatter."),
}
LENGTHS = {
    "short": ("Be brief.", "Keep it short."),
    "long": ("Tell me in detail.", "Explain it fully."),
    "any": ("",),
}

CHAT_KINDS = ("where", "colour", "count", "compare", "describe", "safety", "plan")

#: First sentences of an answer by kind: ``{t}`` the thing spoken of, ``{v}`` what is said of it.
CORES = {
    "where": ("the {t} is {v}", "you can find the {t} {v}"),
    "colour": ("the {t} is {v}", "the colour of the {t} is {v}"),
    "count": ("there are {v} {t}", "I count {v} {t}"),
    "compare": ("{v}", "I think {v}"),
    "describe": ("the {t} is {v}", "I see that the {t} is {v}"),
    "safety": ("you should {v}", "it is best to {v}"),
    "plan": ("you should {v}", "{v}"),
}
#: What an answer to a comparison says when it speaks of the other thing only.
PRICE = "the {t} costs {n} coins"
CHEAPER = "the {t} costs {w} than the {o}"

#: Second sentences of a long answer, by kind.
TAILS = {
    "where": (
        "It has been there since the early morning and nobody has moved it.",
        "If you go and look for the {t}, you will see it at once.",
    ),
    "colour": (
        "I looked at the {t} twice in good light to be sure of it.",
        "Somebody painted it last year and the paint still looks bright today.",
    ),
    "count": (
        "I went through all the {t} one by one and counted them twice.",
        "If somebody brings more of them, the number will change, so count again.",
    ),
    "compare": (
        "I looked at both of the prices twice and took them one by one.",
        "If the prices change, you should look at the numbers once again.",
    ),
    "describe": (
        "People like to look at the {t} when they come by in the morning.",
        "It has been with us for many years and still works well today.",
    ),
    "safety": (
        "Do it before anybody else comes by, and then look at the {t} again.",
        "After that you can come back and see how the {t} looks today.",
    ),
    "plan": (
        "Start in the early morning, and rest for a while on the way there.",
        "When you come to the place, put the {t} down and look around.",
    ),
}
