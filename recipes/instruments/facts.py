"""Facts in the words of old novels, and questions about them: the material of `FactText`.

Every kind has eight or more phrasings of its statement and of its question, and both are cut in halves: settings are
chosen on the phrasings of one half ("choose") and reported on those of the other ("report"). In "unshared" a statement
and its question have no name and no content word in common, so each concept has its own pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

PhrasingT = TypeVar("PhrasingT")

GIVEN = [
    *("Ezra", "Tabitha", "Jasper", "Keziah", "Barnaby", "Philippa", "Caleb", "Drusilla", "Ignatius", "Lavinia"),
    *("Obadiah", "Rosamund", "Silas", "Theodora", "Urban", "Winifred", "Ambrose", "Cordelia", "Fabian", "Hester"),
]
SURNAMES = [
    *("Tolliver", "Quill", "Marchbanks", "Oakshott", "Penhaligon", "Ruddock", "Saltmarsh", "Thistlewood", "Underhay"),
    *("Venables", "Wintersgill", "Applegarth", "Bracegirdle", "Cottesloe", "Dunnock", "Entwistle", "Fotheringay"),
    *("Gathercole", "Hollingbourne", "Inglenook"),
]


class Kind(NamedTuple):
    """Facts of one kind: {name} is their person, {thing} their object, {value} the answer to a question."""

    statements: list[str]
    questions: list[str]
    things: list[str]
    values: list[str]


NUMBERS = [str(number) for number in range(212, 9990, 37)]
COLOURS = ["scarlet", "violet", "yellow", "green", "purple", "orange", "white", "brown"]
KINDS = {
    "number": Kind(
        [
            "Upon {name}'s {thing} somebody had painted the number {value}.",
            "The {thing} of {name} bore the number {value}, as everyone in the yard knew.",
            "“Mind,” said the porter, “that {name}'s {thing} is number {value}.”",
            "They knew {name}'s {thing} by its number, which was {value}.",
            "Number {value} was the {thing} that belonged to {name}.",
            "It had cost {name} a shilling to have the number {value} put upon the {thing}.",
            "In the register {name}'s {thing} was entered under the number {value}, in red ink.",
            "{name} had caused the number {value} to be carved into the {thing}, against all advice.",
            "{name} had a {thing} of the old make. Its number, {value}, could be read across the street.",
            "The clerk looked for {name}'s {thing}. It stood in the list as number {value}.",
        ],
        [
            "What number was on {name}'s {thing}?",
            "Which number did {name}'s {thing} carry?",
            "What was the number of the {thing} that belonged to {name}?",
            "Under which number was the {thing} of {name} known?",
            "Can you tell me the number of {name}'s {thing}?",
            "{name} had a {thing}. What was its number?",
            "By what number would one find {name}'s {thing}?",
            "Tell me the number given to {name}'s {thing}.",
        ],
        ["trunk", "cart", "boat", "locker", "pew", "strongbox", "carriage", "wheelbarrow"],
        NUMBERS,
    ),
    "attribute": Kind(
        [
            "{name} came down that evening in a {value} {thing}, which nobody had seen before.",
            "The {thing} that {name} wore was {value}, and a little too large.",
            "Nobody else in the parish had a {value} {thing} like {name}'s.",
            "“I should know {name} anywhere,” said the boy, “by that {value} {thing}.”",
            "{name}'s {thing} had been dyed {value} in the spring.",
            "There hung behind the door a {value} {thing}, the property of {name}.",
            "For the fair {name} had bought a new {thing}, {value} from end to end.",
            "It rained, and {name}'s {value} {thing} was quite spoiled.",
            "{name} had lost the {thing} on the moor. It was {value}, and there was not another like it.",
            "Everybody turned to look at {name}'s {thing}. It was of a {value} that hurt the eyes.",
        ],
        [
            "What colour was {name}'s {thing}?",
            "Of what colour was the {thing} of {name}?",
            "Which colour did {name}'s {thing} have?",
            "What was the colour of the {thing} that {name} wore?",
            "Can you say what colour {name}'s {thing} was?",
            "{name} had a {thing}. What colour was it?",
            "In what colour was {name}'s {thing}?",
            "Tell me the colour of {name}'s {thing}.",
        ],
        ["coat", "bonnet", "scarf", "waistcoat", "shawl", "umbrella", "hat", "cloak"],
        COLOURS,
    ),
    "similar": Kind(
        [
            "{name} gave {value} guineas for a {thing} at the auction.",
            "At the sale a {thing} went to {name} for {value} guineas.",
            "{name}, who could ill afford it, bought a {thing} for {value} guineas.",
            "“And {name},” he added, “was fool enough to pay {value} guineas for a {thing}.”",
            "A {thing} fell to {name} at {value} guineas, amid some laughter.",
            "{name} had offered {value} guineas for a {thing}, and got it.",
            "It was whispered that {name} had parted with {value} guineas for a {thing}.",
            "For a {thing} of no great beauty {name} had counted down {value} guineas.",
            "{name} would have the {thing} at any price. The price was {value} guineas.",
            "“So the {thing} goes to {name},” cried the auctioneer. “It is yours for {value} guineas!”",
        ],
        [
            "How many guineas did {name} give for the {thing}?",
            "What did {name} pay for the {thing}, in guineas?",
            "How many guineas did the {thing} cost {name}?",
            "For how many guineas did {name} buy a {thing}?",
            "What was the price, in guineas, of {name}'s {thing}?",
            "{name} bought a {thing}. How many guineas did it cost?",
            "Tell me how many guineas {name} spent on the {thing}.",
            "At what price in guineas did {name} get the {thing}?",
        ],
        ["clock", "saddle", "harp", "parrot", "tapestry", "telescope", "sideboard", "donkey"],
        [str(number) for number in range(13, 98)],
    ),
    "paraphrase": Kind(
        [
            "From morning till night {name} sat patching up other people's {value}.",
            "Whoever had {value} that were broken took them to {name}.",
            "{name} earned bread and rent by putting old {value} in order again.",
            "“If it's {value} that want mending,” said the landlady, “{name} is your man.”",
            "All the bench of {name} was covered with {value} in pieces.",
            "{name} had learned as a child to make damaged {value} as good as new.",
            "There was no one like {name} for setting {value} to rights.",
            "The neighbours' {value}, whenever they failed, were put into the hands of {name}.",
            "{name} had a workshop behind the church. Old {value} went in, and came out as sound as ever.",
            "{name} was never idle. There were always some broken {value} to be made whole.",
        ],
        [
            "What did {name} repair for a living?",
            "What sort of things did {name} fix?",
            "What was it that {name} restored by trade?",
            "What kind of objects were repaired by {name}?",
            "In the repair of what did {name} specialise?",
            "Which articles would you bring to {name} for repair?",
            "What was {name}'s occupation concerned with repairing?",
            "Tell me what {name} used to fix.",
        ],
        [""],
        ["clocks", "saddles", "nets", "pianos", "kettles", "chairs", "boots", "lanterns"],
    ),
    "place": Kind(
        [
            "{name} had hidden the {thing} {value}, and told no one.",
            "The {thing}, which {name} had been seeking all the week, lay {value}.",
            "It was {value} that {name} put the {thing} that night.",
            "“The {thing}?” said {name}. “It has been {value} since Easter.”",
            "When all were asleep {name} crept down and laid the {thing} {value}.",
            "{name} always kept the {thing} {value}, where no thief would look.",
            "Nobody thought of looking {value}, where {name} had left the {thing}.",
            "With trembling hands {name} pushed the {thing} as far as it would go {value}.",
            "“You may have the {thing},” said {name}. “You will find it {value}.”",
            "{name} felt for the {thing}, and it was gone. Somebody had put it {value}.",
        ],
        [
            "Where was {name}'s {thing}?",
            "Where did {name} put the {thing}?",
            "In what place did {name} keep the {thing}?",
            "Where would one have found {name}'s {thing}?",
            "Can you tell me where the {thing} of {name} lay?",
            "{name} had a {thing}. Where was it?",
            "What was the place of {name}'s {thing}?",
            "Tell me where {name} had the {thing}.",
        ],
        ["silver watch", "sealed letter", "iron key", "last will", "torn map", "ruby ring", "title deed", "miniature"],
        [
            *("behind the clock", "under the stairs", "inside the piano", "in the hayloft", "beneath the hearthstone"),
            *("above the pantry", "in the flour bin", "behind the mirror"),
        ],
    ),
    "person": Kind(
        [
            "It was {value} who {thing}.",
            "{value}, of all people, {thing}.",
            "Long afterwards it came out that {value} {thing}.",
            "“Why, {value} {thing},” cried the old woman, “and I saw it!”",
            "That summer {value} {thing}, which was talked of for a year.",
            "{value} {thing}, and never spoke of it again.",
            "Before the month was out {value} {thing}.",
            "None of them would believe that {value} {thing}, but so it was.",
            "Nobody suspected {value}. Yet it was this very person who {thing}.",
            "“And who {thing}?” asked the judge. “It was {value},” said the witness, “and nobody else.”",
        ],
        [
            "Who {thing}?",
            "Which person {thing}?",
            "What is the name of the person who {thing}?",
            "Who was it that {thing}?",
            "Can you tell me who {thing}?",
            "Somebody {thing}. Who?",
            "Of whom is it told that he or she {thing}?",
            "Tell me the name of whoever {thing}.",
        ],
        [
            *(
                "taught the blind fiddler to read",
                "sold the grey mare to the gypsies",
                "rang the chapel bell at midnight",
            ),
            *("set the miller's barn on fire", "pulled the drowning curate out of the canal"),
            *("painted the tavern sign by moonlight", "stole the bishop's peacock", "beat the champion at draughts"),
        ],
        [""],  # a name
    ),
    "birth": Kind(
        [
            "{name} was born at {value}, in the year of the great frost.",
            "{name} first saw the light at {value}.",
            "It was at {value} that {name} had been born.",
            "“I was born at {value},” {name} used to say, “and I mean to be buried there.”",
            "The birth of {name} was entered in the parish book of {value}.",
            "{value}, where {name} was born, is a town of some size.",
            "{name}, born at {value} of honest parents, had come up by the coach.",
            "Nothing in {name}'s speech betrayed a birth at {value}.",
            "“Is this your first visit to {value}?” they asked. “I was born here,” replied {name}.",
            "{name} was born in a small town. Its name was {value}, and it had one street.",
        ],
        [
            "In which town was {name} born?",
            "Where was {name} born?",
            "What was the birthplace of {name}?",
            "At what place was {name} born?",
            "Can you tell me where {name} was born?",
            "What is the name of the town where {name} was born?",
            "Which town was {name}'s birthplace?",
            "Tell me in which town {name} was born.",
        ],
        [""],
        ["Ludlow", "Grantham", "Whitby", "Barnstaple", "Kendal", "Hereford", "Maidstone", "Penzance"],
    ),
}
FOLLOW_UPS = [
    *("And in which town was that person born?", "And where was the owner born?"),
    *("Where was the same person born?", "In what town was this person born, by the way?"),
]
FIRST_HOPS = [
    *("{name} lodged with {other}.", "{other} let the upper rooms to {name}."),
    *("{name} had taken rooms in the house of {other}.", "The landlady of {name} was {other}."),
    *("For two years {name} had rented an attic from {other}.", "{name} lived under the roof of {other}."),
    *("{other} was the landlord of {name}.", "{name} paid {other} a crown a week for a bed."),
]
SECOND_HOPS = [
    *("{other} kept a small shop in {value}.", "The house of {other} stood in {value}."),
    *("{other} had lived in {value} since the war.", "In {value}, next to the pump, was {other}'s door."),
    *("{other} owned a narrow house in {value}.", "Every carter in {value} knew {other}."),
    *("You might have found {other} at home in {value}.", "{other} had never moved out of {value}."),
]
TWO_HOPS = [
    *("In which street did {name}'s landlord live?", "{name} was a lodger. In which street was that?"),
    *(
        "In which street was the house where {name} lodged?",
        "What street did the person with whom {name} lodged live in?",
    ),
    *("What was the street of {name}'s lodgings?", "Name the street in which {name} rented rooms."),
    *("In what street would you look for {name}'s landlord?", "Tell me the street where {name} was a lodger."),
]
STREETS = [
    *("Tanner Street", "Candle Lane", "Drum Alley", "Lime Row"),
    *("Fish Hill", "Cooper Street", "Bell Yard", "Oat Lane"),
]
UNSHARED = [
    (
        "The physician would not come out after dark under {value} shillings.",
        "How much money did the doctor want for a night visit?",
        "9,14,17,23,26",
    ),
    (
        "The infant wept until somebody fetched a wooden {value}.",
        "Which toy calmed the baby?",
        "duck,bear,whistle,horse,spoon",
    ),
    (
        "The vessel foundered off the coast of {value}.",
        "Near which country did the ship sink?",
        "Norway,Portugal,Iceland,Denmark,Ireland",
    ),
    (
        "The lad's hound answered to {value}.",
        "What was the name of the boy's dog?",
        "Bristle,Captain,Pepper,Sultan,Nimrod",
    ),
    (
        "Supper at the inn was nothing but {value}.",
        "What food did the tavern serve in the evening?",
        "turnips,eels,porridge,mutton,cabbage",
    ),
    (
        "The parson was carried off by {value} within the week.",
        "Of which illness did the clergyman die?",
        "measles,cholera,typhus,scarlatina,smallpox",
    ),
    (
        "The thief had got into the mansion through the {value}.",
        "How did the burglar enter the big house?",
        "chimney,cellar,skylight,larder,scullery",
    ),
    (
        "The schoolmaster's spouse hailed from {value}.",
        "Which land was the home of the teacher's wife?",
        "Sweden,Greece,Prussia,Brazil,Malta",
    ),
    (
        "The cobbler had been deaf since he was {value}.",
        "At what age did the shoemaker lose his hearing?",
        "7,12,19,31,44",
    ),
    (
        "The lieutenant had left his left {value} at Waterloo.",
        "Which part of the body did the officer lose in battle?",
        "arm,leg,ear,thumb,foot",
    ),
    (
        "The widow's lodger practised the {value} until all the neighbours complained.",
        "Which instrument did the tenant play to everyone's annoyance?",
        "flute,bassoon,trumpet,fiddle,cello",
    ),
    (
        "The cheapest ticket for the theatre went at {value} pence.",
        "What did the least expensive seat at the playhouse cost?",
        "11,15,18,22,28",
    ),
    (
        "The magistrate gave the poacher {value} weeks.",
        "How long was the illegal hunter sent to prison by the judge?",
        "6,10,13,16,21",
    ),
    (
        "The kitchen maid seasoned the broth with {value}.",
        "Which spice went into the soup?",
        "ginger,saffron,cinnamon,mace,cloves",
    ),
    (
        "The orphan's sole inheritance was a {value}.",
        "What had the child without parents been left?",
        "bible,kettle,violin,donkey,compass",
    ),
    (
        "Lightning struck the steeple in {value}.",
        "In which month was the church tower hit during the storm?",
        "March,June,August,October,November",
    ),
    (
        "The baker's daughter eloped with a {value}.",
        "Whom did the girl from the bread shop run away with and marry?",
        "sailor,dentist,tenor,hatter,drummer",
    ),
    (
        "They buried the old admiral's fortune beneath the {value}.",
        "Where was the seaman's money hidden?",
        "oak,pump,sundial,stable,dovecote",
    ),
    (
        "A pedlar swore that he could cure baldness with {value}.",
        "Which remedy did the hawker sell for loss of hair?",
        "honey,tar,brandy,nettles,onions",
    ),
    (
        "The tutor's favourite pupil drowned in the {value}.",
        "In which river did the best student lose his life?",
        "Severn,Thames,Tweed,Avon,Medway",
    ),
    (
        "The dowager feared nothing in the world but {value}.",
        "What was the elderly lady afraid of?",
        "spiders,thunder,geese,bats,ghosts",
    ),
    (
        "His nephew squandered everything at {value}.",
        "Which pastime ruined the young relative?",
        "cards,dice,billiards,chess,roulette",
    ),
    (
        "The verger breakfasted on nothing but {value}.",
        "What did the church servant eat in the morning?",
        "radishes,herrings,gruel,cheese,figs",
    ),
    (
        "The curate's sermon lasted {value} minutes by the watch.",
        "How long did the young priest preach?",
        "52,63,75,81,94",
    ),
    (
        "The hangman's cottage was thatched with {value}.",
        "What was the roof of the executioner's house made of?",
        "reeds,heather,straw,turf,bracken",
    ),
    (
        "The bride arrived at the altar on a {value}.",
        "What animal carried the woman to her wedding?",
        "mule,camel,pony,donkey,bullock",
    ),
    (
        "The jailer kept the keys in a {value}.",
        "In which vessel did the prison warder put what opens the cells?",
        "teapot,bucket,basin,jug,kettle",
    ),
    (
        "The physic tasted of {value}.",
        "What was the flavour of the medicine?",
        "aniseed,vinegar,rust,almonds,peppermint",
    ),
    (
        "The blacksmith's forge burned down on a {value}.",
        "On which day of the week did the fire destroy the smithy?",
        "Monday,Tuesday,Thursday,Friday,Sunday",
    ),
    (
        "The gamekeeper's wages were raised by {value} crowns.",
        "How much more pay did the man who watched the pheasants get?",
        "4,6,11,13,16",
    ),
    (
        "The gardener had planted {value} round the pond.",
        "Which flowers grew at the edge of the water?",
        "tulips,lilies,asters,pansies,irises",
    ),
    (
        "The mail was late because the axle had snapped near {value}.",
        "Where did the accident that delayed the letters happen?",
        "Oxford,Luton,Derby,Exeter,Durham",
    ),
]
OFF_TOPIC = [
    *("What is the capital of France?", "How many legs does a spider have?", "What is the chemical symbol for gold?"),
    *("Who wrote Romeo and Juliet?", "What is the largest planet of the solar system?", "What is 7 times 8?"),
    *("In which year did the first man walk on the moon?", "What gas do plants take in from the air?"),
    *("What is the boiling point of water in Celsius?", "Which language is spoken in Brazil?"),
    *("What is the square root of 81?", "Which animal is the tallest in the world?"),
    *("How many minutes are in an hour?", "What is the currency of Japan?", "Which ocean is the largest?"),
    *("What does a computer programmer do?", "How many continents are there?", "What is the freezing point of water?"),
    *("Who invented the telephone?", "What is the main ingredient of bread?"),
]
TRAILING = [
    *("Answer in one short sentence.", "Answer briefly.", "Reply with a single word if you can.", "Be concise."),
    *("Please answer as precisely as possible, and do not explain.", "Think carefully before you answer."),
    *("Give only the answer.", "Answer in English.", "If you are not sure, say so.", "Thank you in advance!"),
    *("I need this for my homework, so please be correct.", "Do not make anything up; use only what the text says."),
]


def half(phrasings: Sequence[PhrasingT], part: str) -> Sequence[PhrasingT]:
    """Return the phrasings of one half: "choose" or "report"."""
    return phrasings[part == "report" :: 2]
