def vowels(completion, row):
    return sum(letter in "aeiou" for letter in completion) / 8


def small(completion, row):
    return sum(letter.islower() for letter in completion) / 4
