"""The paper's judges. What they are asked is in prompts/, what is read from answers in verdicts.py.

    python train.py configs/paper.py configs/table1.py:quality configs/judges.py:gpt_oss_120b \\
        --judge_url=http://HOST:8000/v1 ...
    python -m tools.bench_judge configs/judges.py:gpt_4o configs/judges.py:gpt_oss_120b \\
        --judge_url http://HOST:8000/v1 --data slimpajama/test --policy CKPT

The last is the study of the nine factuality prompts (tables 13 to 15): agreement is with the first
judge, 200 samples. Temperature, top_p and samples are the paper's. The limits of an answer are
ours where it gives none, and so is the reasoning effort (judge_extra="reasoning_effort=low"), which
it does not name.
"""

prompts = "prompts"
judge_temperature = 1.0
judge_samples = 1

rows = {
    # Quality and factuality; the limit holds its reasoning, too.
    "gpt_oss_120b": dict(judge_model="openai/gpt-oss-120b", judge_top_p=1.0, judge_max_tokens=4096),
    # The factuality study's reference, most accurate by manual annotation.
    "gpt_4o": dict(
        judge_url="https://api.openai.com/v1",
        judge_model="gpt-4o",
        judge_top_p=1.0,
        judge_max_tokens=512,
    ),
    # Of the study, too; it also spoils the suffixes on which the 8B judge is trained.
    "llama_3_3_70b": dict(
        judge_model="meta-llama/Llama-3.3-70B-Instruct", judge_top_p=1.0, judge_max_tokens=512
    ),
    # Llama-3.1-8B-Instruct after teachers.train: safety with quality.
    "finetuned_8b": dict(
        judge_model="judge", judge_samples=5, judge_top_p=0.6, judge_max_tokens=512
    ),
}
