"""What is wrong with a trained model, in plain words: `failures` after every training, `findings` by `diagnose`."""

from vae_ray.evaluation.diagnosis.failures import INFORMATIVE_NATS as INFORMATIVE_NATS
from vae_ray.evaluation.diagnosis.failures import NUM_IMAGES as NUM_IMAGES
from vae_ray.evaluation.diagnosis.failures import find_failures as find_failures
from vae_ray.evaluation.diagnosis.failures import mean_image_nats as mean_image_nats
