// The progress of a job as the server tells it; at its end the page is loaded again, and the server leads to the answer.
const said = document.getElementById("said"), bar = document.getElementById("progress"), source = new EventSource(said.dataset.events);

source.addEventListener("progress", event => {
  const job = JSON.parse(event.data);
  said.textContent = job.total ? said.dataset.step.replace("{done}", job.done).replace("{total}", job.total) : said.dataset[job.state];
  if (job.total) { bar.max = job.total; bar.value = job.done; }
});
for (const end of ["done", "failed", "cancelled"]) source.addEventListener(end, () => { source.close(); location.reload(); });
source.addEventListener("error", () => { if (source.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 3000); });
