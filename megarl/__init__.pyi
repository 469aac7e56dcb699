from megarl.api import Result as Result
from megarl.api import convert_checkpoint as convert_checkpoint
from megarl.api import distill as distill
from megarl.api import dpo as dpo
from megarl.api import evaluate as evaluate
from megarl.api import grpo as grpo
from megarl.api import plan as plan
from megarl.api import ppo as ppo
from megarl.api import read_result as read_result
from megarl.api import rm as rm
from megarl.api import sft as sft
from megarl.config.load import load_config as load_config
from megarl.environments.base import Environment as Environment
from megarl.environments.base import Observation as Observation
from megarl.environments.base import Problem as Problem
from megarl.environments.base import StepResult as StepResult
from megarl.environments.base import Verifier as Verifier
from megarl.errors import UserError as UserError

__version__: str
