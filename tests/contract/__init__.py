"""What every registered method must do; a method is tested by being registered."""
