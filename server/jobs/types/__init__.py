"""The job types, one per module.

Each module has the payload schema and the function of its type. A function receives the attempt's context and the
loaded payload, and returns the result. It never writes the job record.
"""

from server.jobs.table import JobType, merge
from server.jobs.types import code_execution, data_analysis, export, file_processing

JOB_TYPES: dict[str, JobType] = merge((code_execution.jobs, file_processing.jobs, data_analysis.jobs, export.jobs))
