"""What jobs can do, one type a file."""

from server.jobs.table import JobType, merge
from server.jobs.types import code_execution, data_analysis, export, file_processing

JOB_TYPES: dict[str, JobType] = merge((code_execution.jobs, file_processing.jobs, data_analysis.jobs, export.jobs))
