"""What a command does with a run: train, resume, judge, export, compare, and open what came out."""
