"""Our own prompts, for when no file of questions is given: short questions, and longer requests."""

QUESTIONS = (
    "What is the capital of Portugal?",
    "Which planet is closest to the sun?",
    "How many legs does a spider have?",
    "Who painted the ceiling of the Sistine Chapel?",
    "What gas do plants take in from the air?",
    "Do goldfish really forget everything after three seconds?",
    "Which ocean lies between Africa and Australia?",
    "What is the boiling point of water at sea level in degrees Celsius?",
    "Is glass a slow liquid that sags over the centuries?",
    "Which language has the most native speakers?",
    "What is the square root of 144?",
    "Who wrote the play about the prince of Denmark?",
    "What happens if you swallow chewing gum?",
    "In which country were the first Olympic Games held?",
    "How many minutes are there in a day?",
    "Does lightning ever strike the same place twice?",
    "What metal is liquid at room temperature?",
    "Which animal is the tallest in the world?",
    "What is the largest organ of the human body?",
    "Do we use only a tenth of our brain?",
    "Who was the first person to walk on the moon?",
    "What is the longest river in South America?",
    "Can you see the Great Wall of China from the moon?",
    "What is the chemical symbol of gold?",
    "How many strings does a violin have?",
    "Which country has the largest area?",
    "What do bees collect from flowers?",
    "Why is the sky blue on a clear day?",
    "Does cracking your knuckles cause arthritis?",
    "What is the opposite of the word 'ancient'?",
    "Which vitamin does sunlight help the body make?",
    "How many players are there in a football team on the field?",
    "What is 17 times 6?",
    "Which instrument measures air pressure?",
    "Do bulls get angry because of the colour red?",
    "What is the currency of Japan?",
    "Which blood cells fight infections?",
    "How long does light from the sun take to reach the earth?",
    "What is the name of the force that keeps us on the ground?",
    "Who discovered that the earth moves around the sun?",
)

REQUESTS = (
    "Write a short letter to a landlord who has not repaired a broken heater for three weeks. Be polite but "
    "firm, name a date by which the repair must be done, and say what you will do if it is not.",
    "A train leaves at 9:40 and arrives at 13:05. It stops four times for six minutes each. How long is it "
    "moving? Show each step of the calculation and give the result in hours and minutes.",
    "Explain to a ten-year-old why the moon seems to change its shape during a month. Use one comparison from "
    "everyday life, and avoid technical words.",
    "Compare renting a flat with buying one for a couple who will probably move within five years. Name three "
    "points on each side and end with a recommendation.",
    "Describe how you would test whether a new fertiliser helps tomatoes grow, with twelve plants and one "
    "balcony. Mention what you would measure, how often, and what could mislead you.",
    "Here are five words: harbour, lantern, winter, promise, bicycle. Write a story of about a hundred words "
    "in which all five occur, and give it a title.",
    "My program reads a file line by line and becomes slower and slower as the file grows. List the likely "
    "causes in the order in which you would check them, and say how to tell them apart.",
    "Summarise the plot of a well-known fairy tale from the point of view of its villain, in the first person "
    "and in at most six sentences.",
    "A shop sells pens at three for two euros and notebooks at four euros each. Anna spends twenty euros and "
    "buys twice as many pens as notebooks. Can that be? Explain your answer.",
    "Give me a plan for a two-day visit to a mountain town in autumn with a small child: what to do in the "
    "morning, in the afternoon and in the evening, and what to do if it rains.",
    "Rewrite this sentence in three styles, formal, friendly and very short: We are sorry that your parcel "
    "has been late and we hope that it will reach you before the end of the week.",
    "What are the arguments for and against a city closing its centre to cars? Write them as a dialogue "
    "between a shop owner and a cyclist, with four turns each.",
    "Imagine that you advise a school that wants to ban telephones during lessons. Which questions would you "
    "ask the teachers, the parents and the pupils before you give your advice?",
    "Translate the following idea into a simple formula and explain each letter: the longer a candle burns, "
    "the shorter it gets, and it loses the same length every hour.",
    "I have rice, eggs, spinach, half a lemon and some hard cheese at home. Suggest one dish for two people, "
    "with quantities and steps, that takes no more than thirty minutes.",
    "Write the opening of a speech for the retirement of a librarian who has worked in the same village for "
    "forty years. Mention one funny event and thank her without being sentimental.",
    "Explain the difference between weather and climate, and say why one cold winter does not show that the "
    "climate is not changing. Use numbers where they help.",
    "Two friends want to share the cost of a holiday fairly, although one earns twice as much as the other. "
    "Propose two different ways of sharing and say what speaks for each of them.",
    "Draft a notice for a staircase in a block of flats which asks people not to leave shoes and prams in the "
    "hallway, because the fire brigade has complained.",
    "Describe step by step how a bill becomes a law in a parliament with two chambers, and where it can fail "
    "on its way. Keep to what is true of most countries.",
)
