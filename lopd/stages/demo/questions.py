"""Short questions with known answers, which a chat model of 135M parameters can partly answer.

Six kinds: capitals, continents, opposites, plurals, past tenses and products. Every answer is one
word or one number, and is read from a sentence such as `The capital of France is Paris.` by
`ANSWER_REGEX`.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path

SYSTEM = "Answer in one short sentence."
# The first word after "is", "is in" or "=".
ANSWER_REGEX = r"(?s)^.*?(?:\bis\b|=)(?: located\b)?(?: in\b)?\W*(\w+)"

# country:capital:continent
COUNTRIES = """
Albania:Tirana:Europe Algeria:Algiers:Africa Angola:Luanda:Africa Argentina::America
Armenia:Yerevan:Asia Australia:Canberra: Austria:Vienna:Europe Azerbaijan:Baku:Asia
Bahrain:Manama:Asia Bangladesh:Dhaka:Asia Belarus:Minsk:Europe Belgium:Brussels:Europe
Bhutan:Thimphu:Asia Bolivia:Sucre:America Botswana:Gaborone:Africa Brazil:Brasilia:America
Bulgaria:Sofia:Europe Cambodia::Asia Cameroon::Africa Canada:Ottawa:America Chad::Africa
Chile:Santiago:America China:Beijing:Asia Colombia:Bogota:America Croatia:Zagreb:Europe
Cuba:Havana:America Cyprus:Nicosia: Denmark:Copenhagen:Europe Ecuador:Quito:America
Egypt:Cairo:Africa Estonia:Tallinn:Europe Ethiopia::Africa Finland:Helsinki:Europe
France:Paris:Europe Gabon:Libreville:Africa Georgia:Tbilisi: Germany:Berlin:Europe
Ghana:Accra:Africa Greece:Athens:Europe Guinea:Conakry:Africa Guyana:Georgetown:America
Honduras:Tegucigalpa:America Hungary:Budapest:Europe Iceland:Reykjavik:Europe India::Asia
Indonesia:Jakarta:Asia Iran:Tehran:Asia Iraq:Baghdad:Asia Ireland:Dublin:Europe
Israel:Jerusalem:Asia Italy:Rome:Europe Jamaica:Kingston:America Japan:Tokyo:Asia
Jordan:Amman:Asia Kazakhstan:Astana:Asia Kenya:Nairobi:Africa Kuwait::Asia Laos:Vientiane:Asia
Latvia:Riga:Europe Lebanon:Beirut:Asia Liberia:Monrovia:Africa Libya:Tripoli:Africa
Lithuania:Vilnius:Europe Luxembourg::Europe Malawi:Lilongwe:Africa Mali:Bamako:Africa
Malta:Valletta:Europe Mexico::America Moldova:Chisinau:Europe Mongolia:Ulaanbaatar:Asia
Montenegro:Podgorica:Europe Morocco:Rabat:Africa Mozambique:Maputo:Africa Myanmar:Naypyidaw:Asia
Namibia:Windhoek:Africa Nepal:Kathmandu:Asia Netherlands:Amsterdam:Europe
Nicaragua:Managua:America Niger:Niamey:Africa Nigeria:Abuja:Africa Norway:Oslo:Europe
Oman:Muscat:Asia Pakistan:Islamabad:Asia Paraguay:Asuncion:America Peru:Lima:America
Philippines:Manila:Asia Poland:Warsaw:Europe Portugal:Lisbon:Europe Qatar:Doha:Asia
Romania:Bucharest:Europe Russia:Moscow: Rwanda:Kigali:Africa Senegal:Dakar:Africa
Serbia:Belgrade:Europe Slovakia:Bratislava:Europe Slovenia:Ljubljana:Europe
Somalia:Mogadishu:Africa Spain:Madrid:Europe Sudan:Khartoum:Africa Suriname:Paramaribo:America
Sweden:Stockholm:Europe Switzerland:Bern:Europe Syria:Damascus:Asia Taiwan:Taipei:Asia
Tajikistan:Dushanbe:Asia Tanzania:Dodoma:Africa Thailand:Bangkok:Asia Tunisia:Tunis:Africa
Turkey:Ankara: Turkmenistan:Ashgabat:Asia Uganda:Kampala:Africa Ukraine:Kyiv:Europe
Uruguay:Montevideo:America Uzbekistan:Tashkent:Asia Venezuela:Caracas:America Vietnam:Hanoi:Asia
Yemen::Asia Zambia:Lusaka:Africa Zimbabwe:Harare:Africa
"""
OPPOSITES = """
hot:cold big:small fast:slow up:down happy:sad light:dark old:new rich:poor early:late hard:soft
wet:dry open:closed left:right full:empty strong:weak long:short high:low near:far loud:quiet
thick:thin wide:narrow deep:shallow clean:dirty good:bad true:false hope:despair love:hate
war:peace day:night black:white north:south east:west inside:outside above:below before:after
first:last start:end win:lose buy:sell push:pull give:take come:go rise:fall accept:reject
accident:design alive:dead always:never ancient:modern arrive:depart asleep:awake best:worst
better:worse bitter:sweet brave:cowardly bright:dim broad:narrow calm:agitated cheap:expensive
complex:simple cruel:kind dangerous:safe difficult:easy enemy:friend entrance:exit even:odd
everything:nothing export:import fact:fiction failure:success famous:unknown fat:thin find:lose
forget:remember forward:backward freeze:melt fresh:stale front:back future:past generous:selfish
guilty:innocent healthy:sick heavy:light hero:villain hire:fire husband:wife increase:decrease
interesting:boring junior:senior king:queen large:small laugh:cry major:minor male:female
maximum:minimum more:less morning:evening most:least noisy:quiet over:under patient:impatient
polite:rude positive:negative possible:impossible private:public question:answer reward:punishment
rough:smooth sharp:blunt sink:float smart:stupid sour:sweet summer:winter sunrise:sunset
tall:short tight:loose top:bottom victory:defeat visible:invisible wise:foolish young:old
"""
PLURALS = """
dog:dogs box:boxes child:children baby:babies leaf:leaves city:cities bus:buses man:men foot:feet
tree:trees book:books knife:knives cat:cats wolf:wolves tooth:teeth mouse:mice goose:geese
woman:women person:people lady:ladies story:stories church:churches dish:dishes brush:brushes
watch:watches glass:glasses class:classes fox:foxes tax:taxes hero:heroes potato:potatoes
tomato:tomatoes piano:pianos photo:photos wife:wives life:lives half:halves shelf:shelves
thief:thieves loaf:loaves country:countries family:families party:parties berry:berries fly:flies
key:keys toy:toys day:days boy:boys monkey:monkeys car:cars house:houses horse:horses table:tables
chair:chairs apple:apples orange:oranges pen:pens cup:cups bottle:bottles window:windows door:doors
river:rivers mountain:mountains star:stars flower:flowers bird:birds cow:cows pig:pigs egg:eggs
hand:hands eye:eyes ear:ears teacher:teachers student:students doctor:doctors friend:friends
school:schools garden:gardens shoe:shoes hat:hats shirt:shirts dress:dresses bench:benches
beach:beaches peach:peaches match:matches kiss:kisses wish:wishes lunch:lunches army:armies
enemy:enemies puppy:puppies cherry:cherries penny:pennies lily:lilies body:bodies copy:copies
calf:calves scarf:scarves ox:oxen crisis:crises cactus:cacti analysis:analyses king:kings
ship:ships train:trains
"""
PAST_TENSES = """
walk:walked go:went run:ran eat:ate play:played see:saw sing:sang write:wrote jump:jumped
swim:swam buy:bought take:took give:gave make:made come:came know:knew think:thought find:found
tell:told leave:left feel:felt keep:kept begin:began bring:brought hold:held stand:stood
hear:heard meet:met pay:paid sit:sat speak:spoke lead:led grow:grew lose:lost fall:fell send:sent
build:built spend:spent drive:drove break:broke rise:rose teach:taught catch:caught choose:chose
draw:drew drink:drank fly:flew forget:forgot freeze:froze hide:hid ride:rode ring:rang shake:shook
sleep:slept steal:stole swear:swore throw:threw wake:woke wear:wore win:won work:worked
talk:talked call:called ask:asked help:helped look:looked open:opened close:closed love:loved
live:lived move:moved clean:cleaned cook:cooked dance:danced laugh:laughed listen:listened
visit:visited wait:waited watch:watched wash:washed travel:traveled study:studied carry:carried
cry:cried try:tried want:wanted need:needed start:started finish:finished learn:learned
paint:painted smile:smiled climb:climbed push:pushed pull:pulled
"""


def all_questions() -> list[tuple[str, str]]:
    """Every question with its answer, in a fixed order."""
    pairs: list[tuple[str, str]] = []
    for name, capital, continent in (line.split(":") for line in COUNTRIES.split()):
        if capital:
            pairs.append((f"What is the capital of {name}?", capital))
        if continent:
            pairs.append((f"Is {name} in Africa, America, Asia or Europe?", continent))
    for form, words in (
        ("What is the opposite of '{}'? Answer with one word.", OPPOSITES),
        ("What is the plural of '{}'?", PLURALS),
        ("What is the past tense of '{}'?", PAST_TENSES),
    ):
        for word, answer in (line.split(":") for line in words.split()):
            pairs.append((form.format(word), answer))
    for a in range(2, 10):
        pairs += [(f"What is {a} times {b}?", str(a * b)) for b in range(2, 10)]
    return pairs


def split_questions(counts: Mapping[str, int], seed: int) -> dict[str, list[tuple[str, str]]]:
    """Disjoint sets of questions by name, drawn from all of them."""
    pairs = all_questions()
    random.Random(seed).shuffle(pairs)
    assert sum(counts.values()) <= len(pairs)
    sets: dict[str, list[tuple[str, str]]] = {}
    for name, count in counts.items():
        sets[name], pairs = pairs[:count], pairs[count:]
    return sets


def write_questions(path: Path, pairs: list[tuple[str, str]]) -> Path:
    """Write JSONL of chats with their expected answers."""
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
            ]
            file.write(json.dumps({"messages": messages, "answer": answer}) + "\n")
    return path
