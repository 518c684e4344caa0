from rayk import Recipe
from rayk.synthesis import Candidate, completion_problem, completion_text, sampling_parameters


class Shortest(Recipe):
    """Keep the shortest of `options.samples` completions of each prompt."""

    summary = "the shortest of several completions of each prompt"

    @property
    def max_requests(self):
        return len(self.prompts) * self.settings.options["samples"]

    async def generate(self, index, prompt):
        sampling = self.settings.sampling
        seeds = [self.client.seed(0, index, i) for i in range(self.settings.options["samples"])]
        requests = [prompt.request(seed, sampling_parameters(sampling)) for seed in seeds]
        candidates = []
        for response in await self.client.complete_all(requests):
            text = completion_text(response, sampling.stop)
            candidate = Candidate(prompt.text, text, index, (response,), {"characters": len(text)})
            problem = completion_problem(response, text)
            candidates.append(candidate.reject(*problem) if problem else candidate)
        usable = [candidate for candidate in candidates if not candidate.rejected_by]
        shortest = min(usable, key=lambda candidate: candidate.fields["characters"], default=None)
        return [
            candidate.reject("not_shortest", "another completion is shorter")
            if candidate in usable and candidate is not shortest
            else candidate
            for candidate in candidates
        ]
