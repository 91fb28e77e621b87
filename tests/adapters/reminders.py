"""Write data/json_generated.jsonl: sentences about who does what and when, with their JSON.

    python tests/adapters/reminders.py

Names and tasks here never occur in the held-out file, which is written by hand.
"""

import json
import random
from pathlib import Path

OUT = Path(__file__).parent / "data" / "json_generated.jsonl"
SEED = 1
COUNT = 320

PEOPLE = (
    *("Anna", "Tom", "Lena", "Omar", "Grace", "Paul", "Yuki", "Carlos", "Nina", "Ahmed", "Julia"),
    *("Ben", "Sofia", "Ivan", "Maria", "Peter", "Chloe", "Daniel", "Fatima", "Lucas", "Emma"),
    *("Oliver", "Mei", "Hannah", "Jacob", "Elif", "Robert", "Ingrid", "Samuel", "Zoe", "Viktor"),
    *("Mrs. Brown", "Dr. Klein", "Mr. Lopez", "me", "my sister", "my brother", "the team"),
    *("Uncle Joe", "my boss", "Kate", "Leo", "Amir", "Rosa", "Finn", "Alice", "George", "Tara"),
)
TASKS = (
    *("call the dentist", "buy milk", "water the plants", "send the report", "pick up the parcel"),
    *("book a table", "pay the rent", "walk the dog", "clean the kitchen", "charge the camera"),
    *("return the library books", "feed the cat", "renew the passport", "wash the car", "bake"),
    *("order shoes", "print the tickets", "take out the trash", "fix the bike", "sign the form"),
    *("meet the lawyer", "check the oven", "write to the bank", "visit grandma", "study for math"),
    *("cancel the meeting", "iron the shirts", "paint the fence", "back up the laptop", "vote"),
    *("answer the survey", "practice the piano", "buy two loaves of bread", "mow the lawn", "rest"),
    *("collect the kids from school", "change the sheets", "get a haircut", "empty the dishwasher"),
    *("bring the blue folder", "update the price list", "test the smoke alarm", "rent a van"),
    *("prepare the slides", "call back the plumber", "lock the back door", "cook lentil soup"),
    *("drop off the keys", "measure the window", "move the desk", "read chapter five", "jog"),
    *("reply to Kevin", "invite the neighbors", "download the photos", "replace the light bulb"),
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CLOCK = tuple(f"{hour} {half}" for half in ("am", "pm") for hour in range(1, 13))
TIMES = (*CLOCK, "7:30 am", "9:15 am", "10:45 am", "12:30 pm", "4:20 pm", "6:30 pm", "noon")

# {when} is a place for both day and time, {day} and {time} for one; "on" and "at" come with them.
SENTENCES = (
    "Remind {person} to {task} {when}.",
    "Please remind {person} to {task} {when}.",
    "Can you remind {person} to {task} {when}?",
    "Tell {person} to {task} {when}.",
    "Ask {person} to {task} {when}.",
    "Don't let {person} forget to {task} {when}.",
    "Make sure to tell {person} to {task} {when}.",
    "I want {person} to {task} {when}.",
    "Get {person} to {task} {when}, please.",
    "{when_first}, remind {person} to {task}.",
    "{when_first}, ask {person} to {task}.",
    "{day_first}, tell {person} to {task} {time}.",
    "{time_first}, please remind {person} to {task} {day}.",
    "It would be nice if you asked {person} to {task} {when}.",
)


def say_day(day: str | None) -> str:
    return "" if day is None else f"on {day}" if day in WEEKDAYS else day


def say_time(time: str | None) -> str:
    return "" if time is None else f"at {time}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def sentence(choice: random.Random, fields: dict[str, str | None]) -> str:
    """One of the sentences, with what is not said left out."""
    says = {"day": say_day(fields["day"]), "time": say_time(fields["time"])}
    order = ("day", "time") if choice.random() < 0.7 else ("time", "day")
    says["when"] = " ".join(says[name] for name in order).strip()
    says |= {f"{name}_first": capital(text) for name, text in says.items()}
    text = " ".join(choice.choice(SENTENCES).format(**(fields | says)).split())
    for mark in ".?,":
        text = text.replace(f" {mark}", mark)
    return capital(text.removeprefix(", "))


def example(choice: random.Random) -> dict[str, str]:
    day = choice.choice((*WEEKDAYS, "today", "tomorrow", *WEEKDAYS))
    fields = {
        "person": choice.choice(PEOPLE),
        "task": choice.choice(TASKS),
        "day": day if choice.random() < 0.75 else None,
        "time": choice.choice(TIMES) if choice.random() < 0.7 else None,
    }
    answer = json.dumps(fields, separators=(",", ":"))
    return {"prompt": sentence(choice, fields), "answer": answer}


def main() -> None:
    choice = random.Random(SEED)
    lines = [json.dumps(example(choice)) + "\n" for _ in range(COUNT)]
    OUT.write_text("".join(lines))


if __name__ == "__main__":
    main()
