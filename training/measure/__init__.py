"""What answers are worth: endpoints, scores, intervals, the results file."""
