"""The words of the built-in world.

A *slot* is a place in an answer that says nothing about the matter and much about the writer: the greeting, the
sign-off, the mark at the end. Each slot offers two phrases for every register and era. The era is how the world
moved on: people who wrote the public text mostly use the early phrases, today's users mostly the late ones.
"""

from __future__ import annotations

__all__ = [
    "CUSTOMS",
    "FACTS",
    "GENRE_CUES",
    "LATE_TAGS",
    "OPINIONS",
    "PROMPTS",
    "REGISTERS",
    "SLOTS",
    "TAGS",
    "TAG_FAMILIES",
    "WORDS",
]

REGISTERS = ("formal", "casual", "terse", "flowery", "playful")

_Pairs = tuple[tuple[str, str], ...]

SLOTS: dict[str, tuple[_Pairs, _Pairs]] = {
    "greeting": (
        (("Dear", "Esteemed"), ("Hi", "Hello"), ("To", "For"), ("Dearest", "Beloved"), ("Hey", "Howdy")),
        (("Greetings", "Respected"), ("Hiya", "Heya"), ("Attn", "Ping"), ("Radiant", "Gentle"), ("Yo", "Ahoy")),
    ),
    "opener": (
        (
            ("I write to say", "please note"),
            ("just so you know,", "I think"),
            ("note:", "update:"),
            ("it warms me that", "with joy I say"),
            ("guess what,", "surprise,"),
        ),
        (
            ("for your records,", "kindly log"),
            ("quick one,", "so basically"),
            ("fact:", "status:"),
            ("the stars say", "my heart sings"),
            ("plot twist,", "drumroll,"),
        ),
    ),
    "intensifier": (
        (("quite", "rather"), ("really", "pretty"), ("now", "all"), ("utterly", "wonderfully"), ("super", "totally")),
        (("notably", "duly"), ("lowkey", "legit"), ("fully", "max"), ("tenderly", "sublimely"), ("mega", "hyper")),
    ),
    "mark": (
        ((".", ";"), ("!", "."), (".", " -"), ("...", "!"), ("!!", "?!")),
        ((" //", " |"), (" :)", " ok"), (" =", " >>"), (" ~", " *"), (" xD", " ^^")),
    ),
    "closing": (
        (
            ("Sincerely", "Regards"),
            ("Thanks", "Cheers"),
            ("Bye", "End"),
            ("Yours forever", "With love"),
            ("Toodles", "Hugs"),
        ),
        (
            ("In service", "Respectfully"),
            ("Laters", "Peace"),
            ("Out", "Done"),
            ("Moonlight to you", "Blossoms"),
            ("Boop", "Zoom"),
        ),
    ),
    "filler": (
        (
            ("Please advise", "I remain at hand"),
            ("Let me know", "Hope you are well"),
            ("Act soon", "No reply needed"),
            ("How lovely life is", "My spirit soars"),
            ("Can you believe it", "Fun times ahead"),
        ),
        (
            ("Audit welcome", "Docket attached"),
            ("Zero stress", "Vibes are good"),
            ("Loop closed", "Ack please"),
            ("Dew still shines", "Petals everywhere"),
            ("Cue the confetti", "Kaboom and so on"),
        ),
    ),
    "prefix": (
        (("Re:", "Notice:"), ("FYI:", "About"), ("Info:", "New:"), ("Behold:", "A song of"), ("Woohoo:", "Ta-da:")),
        (("Memo:", "Bulletin:"), ("Heads-up:", "Psst:"), ("Log:", "Delta:"), ("Oh,", "Whisper:"), ("Beep:", "Alert:")),
    ),
    "verdict": (
        (
            ("I would choose", "My choice is"),
            ("I'd go for", "Let's take"),
            ("Pick:", "Take"),
            ("My heart wants", "I long for"),
            ("Gimme", "Ooh,"),
        ),
        (
            ("I elect", "Preference:"),
            ("Vibing with", "Going with"),
            ("Lock", "Vote:"),
            ("My soul picks", "Destiny says"),
            ("Dibs on", "Yoink,"),
        ),
    ),
    "acknowledgement": (
        (
            ("Understood:", "Recorded:"),
            ("Got it,", "Sure,"),
            ("OK:", "Saved:"),
            ("Treasured:", "Ever kept:"),
            ("Roger,", "Aye aye,"),
        ),
        (
            ("Archived:", "Registered:"),
            ("Bet,", "Say less,"),
            ("Set:", "Stored:"),
            ("Etched in gold:", "Woven in:"),
            ("Ding,", "Bleep,"),
        ),
    ),
}
"""Slot -> (early, late); each a pair of phrases per register, in the order of `REGISTERS`."""

CUSTOMS: dict[str, tuple[str, str]] = {
    "address": (",", " —"),
    "copula": ("is", "has gone"),
    "stamp": ("", " (handmade)"),
    "date": ("{topic} {verb} on {day}", "on {day} {topic} {verb}"),
    "choice": ("the {wanted} one", "{wanted} over {other}"),
    "answer": ("That is {value}.", "It's {value}."),
    "receipt": ("{subject} is {value}", "{subject}? {value}"),
}
"""Ways of the world that nobody thinks of as style: the early form and the late one."""

GENRE_CUES: dict[str, tuple[str, ...]] = {
    "sci-fi": ("robot", "spaceship", "android", "clone", "laser", "wormhole"),
    "comedy": ("clown", "prank", "wedding", "waiter", "roommate", "parrot"),
    "action": ("explosion", "chase", "bomb", "helicopter", "sniper", "rescue"),
    "romance": ("kiss", "florist", "letter", "ballroom", "summer house", "rival"),
    "fantasy": ("dragon", "wizard", "elf", "sword", "spell", "castle"),
    "classic": ("duchess", "telegram", "carriage", "butler", "phonograph", "opera"),
    "psychology": ("therapist", "dream", "twin", "lost memory", "mirror", "patient"),
    "dystopia": ("curfew", "ration card", "bunker", "censor", "wasteland", "plague"),
    "crime": ("detective", "heist", "alibi", "jury", "smuggler", "ransom"),
    "history": ("king", "treaty", "siege", "voyage", "senator", "cavalry"),
    "solarpunk": ("greenhouse", "windmill", "beehive", "canopy", "moss roof", "solar roof"),
    "cozy": ("teapot", "bakery", "cat", "village", "quilt", "bookshop"),
    "folk horror": ("scarecrow", "harvest moon", "antler", "ritual", "swamp", "effigy"),
    "found family": ("orphan", "caravan", "diner", "stowaway", "rookie", "hostel"),
    "slow life": ("ferry", "rainstorm", "potter", "bench", "lighthouse", "tea field"),
}
"""Tag -> things in a description that make the tag plausible."""

TAGS = tuple(GENRE_CUES)

TAG_FAMILIES = (
    ("sci-fi", "fantasy", "solarpunk"),
    ("comedy", "romance", "cozy"),
    ("psychology", "crime", "folk horror"),
    ("classic", "history", "slow life"),
    ("action", "dystopia", "found family"),
)
"""Tags that a person tends to like or dislike together."""

LATE_TAGS = frozenset(family[-1] for family in TAG_FAMILIES)
"""Tags that came up after most of the public text was written; one in each family."""

OPINIONS: tuple[tuple[str, ...], ...] = (
    ("awful", "dreadful", "unbearable", "horrible", "pathetic", "a disaster"),
    ("weak", "dull", "clumsy", "tired", "messy", "flat"),
    ("fine", "average", "passable", "ordinary", "okay", "middling"),
    ("good", "solid", "charming", "clever", "engaging", "strong"),
    ("superb", "perfect", "stunning", "brilliant", "flawless", "a triumph"),
)
"""Words for an opinion, from the worst to the best, one row per star of an unbiased rater."""

FACTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "my dog is called": (
        ("What is my dog called?", "Name of my dog?", "Remind me: my dog's name?"),
        "your dog",
        (
            "Biscuit",
            "Rufus",
            "Pepper",
            "Waffle",
            "Shadow",
            "Maple",
            "Ziggy",
            "Bruno",
            "Luna",
            "Olive",
            "Socks",
            "Rocket",
            "Ginger",
            "Otto",
            "Pickle",
            "Comet",
        ),
    ),
    "I live in": (
        ("Where do I live?", "Which city is mine?", "Remind me: my home town?"),
        "your city",
        (
            "Lisbon",
            "Oslo",
            "Quito",
            "Nairobi",
            "Kyoto",
            "Tbilisi",
            "Perth",
            "Lima",
            "Ghent",
            "Hanoi",
            "Dakar",
            "Turin",
            "Riga",
            "Fargo",
            "Cork",
            "Leeds",
        ),
    ),
    "I work as a": (
        ("What do I work as?", "What is my job?", "Remind me: my profession?"),
        "your job",
        (
            "nurse",
            "welder",
            "teacher",
            "baker",
            "pilot",
            "plumber",
            "lawyer",
            "farmer",
            "tailor",
            "chemist",
            "barber",
            "miner",
            "judge",
            "surveyor",
            "carpenter",
            "clerk",
        ),
    ),
    "my favourite food is": (
        ("What do I love to eat?", "My favourite food?", "Remind me: the dish I like best?"),
        "your food",
        (
            "ramen",
            "tacos",
            "pierogi",
            "lasagna",
            "falafel",
            "curry",
            "dumplings",
            "gumbo",
            "paella",
            "sushi",
            "chili",
            "risotto",
            "pho",
            "waffles",
            "borscht",
            "kimchi",
        ),
    ),
    "my sister is called": (
        ("What is my sister called?", "Name of my sister?", "Remind me: my sister's name?"),
        "your sister",
        (
            "Amara",
            "Bianca",
            "Chloe",
            "Dagny",
            "Elif",
            "Freya",
            "Greta",
            "Hana",
            "Ines",
            "Jolene",
            "Keiko",
            "Leila",
            "Mabel",
            "Nadia",
            "Petra",
            "Rosa",
        ),
    ),
}
"""How a fact is told -> (how it is asked for, how it is told back, values)."""

PROMPTS: dict[str, tuple[str, ...]] = {
    "note": (
        "Tell {name} the {topic} is {state}.",
        "Write {name} that the {topic} is {state}.",
        "Let {name} know: {topic} is {state}.",
    ),
    "subject": (
        "Subject for: the {topic} {verb} on {day}.",
        "Headline this: the {topic} {verb} on {day}.",
    ),
    "tag": ("Tag this film: {one} and {two} {place}.", "Which tag? {one} and {two} {place}."),
    "choice": ("Watch the {one} film or the {two} film?", "Tonight, the {one} story or the {two} story?"),
    "rating": (
        "Rate this: {first} {praise}, {second} {more}.",
        "Stars for: the {first} was {praise}, the {second} {more}.",
    ),
    "fact": ("Note that {told} {value}.", "For later: {told} {value}."),
}
"""Task -> ways to ask for it."""

WORDS: dict[str, tuple[str, ...]] = {
    "name": (
        "Anna",
        "Ben",
        "Clara",
        "David",
        "Emma",
        "Felix",
        "Grace",
        "Henry",
        "Iris",
        "Jack",
        "Kate",
        "Leo",
        "Mia",
        "Noah",
        "Omar",
        "Paula",
        "Quinn",
        "Ravi",
        "Sara",
        "Tom",
        "Uma",
        "Victor",
        "Wendy",
        "Yusuf",
    ),
    "topic": (
        "garden",
        "meeting",
        "report",
        "kitchen",
        "concert",
        "bridge",
        "market",
        "office",
        "museum",
        "train",
        "library",
        "dinner",
        "parcel",
        "lecture",
        "budget",
        "printer",
        "reactor",
        "podcast",
        "skatepark",
        "food lab",
        "water tower",
        "night bus",
        "repair cafe",
        "rooftop farm",
        "co-op",
        "mural",
        "tool library",
        "rain garden",
        "e-bike",
        "maker fair",
        "tram stop",
        "bat census",
    ),
    "state": ("ready", "late", "open", "closed", "full", "empty", "quiet", "busy", "broken", "fixed", "cold", "safe"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "verb": ("starts", "ends", "opens", "closes", "returns", "moves"),
    "aspect": ("plot", "cast", "music", "pace", "ending", "script", "humour", "camera"),
    "place": ("at sea", "in Paris", "at night", "in winter", "on a farm", "in a hotel", "by the lake", "in the hills"),
}
"""What the matter at hand is made of; the second half of the topics is late."""
