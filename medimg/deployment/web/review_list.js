// The worklist: search as you type, J K or arrows move, Enter opens (a link does that itself), / goes to the search.
const rows = [...document.querySelectorAll("#work tbody tr")], find = document.getElementById("find"), none = document.getElementById("none");
const shown = () => rows.filter(row => !row.hidden);

find?.addEventListener("input", () => {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) row.hidden = !words.every(word => row.dataset.text.includes(word));
  if (none) none.hidden = shown().length > 0;
});

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === find) {
    if (event.key === "Escape") { find.value = ""; find.dispatchEvent(new Event("input")); find.blur(); }
    if (event.key !== "ArrowDown" && event.key !== "Enter") return;
  }
  const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key], list = shown();
  if (event.key === "/") { event.preventDefault(); find.focus(); return; }
  if (event.target === find && event.key === "Enter") { list[0]?.querySelector("a").click(); return; }
  if (!step || !list.length) return;
  event.preventDefault();
  const at = list.findIndex(row => row.contains(document.activeElement));
  list[Math.min(list.length - 1, Math.max(0, at < 0 ? 0 : at + step))].querySelector("a").focus();
});
