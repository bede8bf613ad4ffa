"""Word lists of the generated tasks. Changing a list changes every task: raise ``tasks.TASKS_VERSION`` with it."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Keys, variables and list entries. Lower case, at most 7 letters (so prompts stay short), none a prefix of another
# (so a key is told from the others before its end is reached), none used in the filler sentences below.
NAMES: tuple[str, ...] = _split(
    """
    acorn agate amber anchor anvil apple apron arrow atlas aurora badger bamboo banana banjo barley basil basket
    beacon beaver beetle bishop bison blanket blossom bonfire bottle boulder branch bridge bronze bucket buffalo
    button cabin cactus camel candle canoe canyon carbon carrot castle cedar cello chalk cherry chess chimney cinder
    circle clover cobalt coconut comet compass copper coral cotton cougar cradle crane crater cricket crimson crown
    crystal cypress dagger daisy delta desert diamond dolphin domino donkey dragon drum eagle easel echo eclipse
    elbow ember emerald engine falcon feather fennel ferret fiddle finch flame flint forest fossil fox galaxy garden
    garlic gazelle geyser ginger glacier goblet gold granite grape guitar hammer harbor harp hazel helmet heron
    hickory honey hornet igloo indigo iris island ivory jackal jaguar jasmine jasper jigsaw jungle juniper kernel
    kettle koala ladder lagoon lantern lava lemon lentil leopard lilac lizard lobster locket lotus magnet magpie
    mango maple marble meadow melon meteor mirror monsoon moose mosaic mustard napkin nebula nectar needle nickel
    nutmeg oak oasis ocean olive onyx opal orange orbit orchid osprey otter oxygen oyster paddle panda panther paper
    parrot parsley peach peanut pebble pelican pencil pepper piano pigeon pine planet plum pocket pollen poppy prism
    puffin pumpkin puzzle quail quartz quill rabbit raccoon radish raven ribbon river rocket rose ruby saddle
    saffron salmon satin saturn scarf shadow shovel silver spider spruce squash stone sugar summit sunset swan tango
    temple thistle thunder tiger timber tulip tunnel turnip turtle valley vanilla velvet violet violin volcano wagon
    walnut walrus weasel whale willow window winter yogurt zebra zephyr
    """
)

# Parts of a filler sentence: "The <adjective> <subject> <verb> the <adjective> <object> <place>."
ADJECTIVES: tuple[str, ...] = _split(
    """
    old young quiet busy careful cheerful distant early famous gentle hidden honest large late lonely narrow new
    patient plain polite proud rare restless rich rusty second serious shy simple sleepy slow small smooth steady
    strange strong sudden tall thin third tidy tired useful warm weak wide wild wise
    """
)
SUBJECTS: tuple[str, ...] = _split(
    """
    actor author baker builder captain carpenter clerk cook dancer doctor driver editor engineer farmer fisherman
    guard guest judge lawyer librarian mayor merchant miller miner neighbour nurse painter pilot plumber poet porter
    printer sailor scholar singer smith soldier student surgeon tailor teacher traveller visitor waiter watchman
    weaver
    """
)
VERBS: tuple[str, ...] = _split(
    """
    admired borrowed bought broke brought carried cleaned collected copied counted described drew examined followed
    forgot found gathered guarded hid inspected kept left lent lost measured mended missed moved noticed opened
    packed painted placed praised promised removed repaired returned saw sent showed sold sorted studied took traded
    used washed
    """
)
OBJECTS: tuple[str, ...] = _split(
    """
    album barrel bell bench blackboard book bowl box brush cart chair clock cloth coat cup curtain desk door drawing
    fence gate glass hat journal key knife lamp ledger letter lock map medal newspaper notebook package parcel
    photograph picture plate poem report rope sack sign spoon stamp statue stove table ticket tool wheel
    """
)
PLACES: tuple[str, ...] = tuple(
    place.replace("-", " ")
    for place in _split(
        """
    above-the-workshop after-the-concert at-the-market at-the-station before-breakfast before-the-storm
    behind-the-church behind-the-school beside-the-lake by-the-wall during-the-holiday during-the-night in-the-attic
    in-the-cellar in-the-classroom in-the-courtyard in-the-evening in-the-hallway in-the-kitchen in-the-morning
    in-the-square near-the-border near-the-mill near-the-museum near-the-office on-the-ferry on-the-hill
    on-the-platform on-the-roof outside-the-hotel outside-the-town past-the-bakery under-the-stairs with-a-friend
    with-great-care without-a-word
        """
    )
)
