"""What happens in a training: errors of the compensated statistics, gradients of earlier layers, growth of weights."""
