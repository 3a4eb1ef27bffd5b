"""The functional training loop: state, step, losses, schedules, optimisers."""
