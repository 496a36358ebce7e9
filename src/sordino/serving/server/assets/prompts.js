// The page that asks a published prompt about a picture.
import { Refused, byId, counted, enter, get, getJson, h, n_a, percent, post, quiet, roundedUp, show, size, tell } from "./shared.js";

const MEASURES = ["local", "neighbor", "overall"];
let server, who, listed;
let manifest = null; // of the version that is chosen
let picture = null; // {blob, name}
let asking = null; // an AbortController while a picture is on its way
let chosen = 0; // counts choices, so that a late answer to an earlier one is dropped

enter(async (described, entered) => {
  [server, who] = [described, entered];
  byId("accepted").textContent =
    `${server.accepted.slice(0, -1).join(", ")} or ${server.accepted.at(-1)}, up to ${size(server.most_bytes)}.`;
  listed = await getJson("v1/prompts");
  byId("columns").hidden = listed.length === 0;
  if (listed.length === 0) {
    byId("page-alert").replaceChildren(
      h("div", { class: "message" }, h("strong", {}, "No prompt to ask"),
        h("span", {}, "This server’s registry has no version that a trusted key signed. Publish one with “sordino publish”.")),
    );
    return;
  }
  const names = [...new Set(listed.map(({ name }) => name))];
  const [name, version] = decodeURIComponent(location.hash.slice(1)).split(":"); // as of a link to a prompt
  byId("prompt").replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  if (names.includes(name)) byId("prompt").value = name;
  versions(version);
});

byId("prompt").addEventListener("change", () => versions());
byId("version").addEventListener("change", choose);

function versions(wanted) {
  const of = listed.filter(({ name }) => name === byId("prompt").value).reverse();
  byId("version").replaceChildren(
    ...of.map(({ version, mark, attacks }, place) =>
      h("option", { value: version },
        [version, place === 0 && "latest", mark, attacks === "unknown" && "attacks not known"].filter(Boolean).join(", "))),
  );
  if (of.some(({ version }) => String(version) === wanted)) byId("version").value = wanted;
  choose();
}

const address = (rest = "") =>
  `v1/prompts/${encodeURIComponent(byId("prompt").value)}${rest}?version=${encodeURIComponent(byId("version").value)}`;

async function choose() {
  const now = ++chosen;
  history.replaceState(null, "", `#${byId("prompt").value}:${byId("version").value}`);
  asking?.abort();
  manifest = null;
  quiet("alert", "card-alert", "card-body");
  byId("status").textContent = "";
  byId("answer").hidden = byId("samples").hidden = byId("mark").hidden = true;
  offerAgain();
  try {
    const found = (await getJson(address())).manifest;
    if (now !== chosen) return;
    manifest = found;
    const { mark } = listed.find(({ name, version }) => name === found.name && version === found.version) ?? {};
    card(found, mark);
    samples(now);
  } catch (error) {
    if (now === chosen) tell("card-alert", error);
  }
}

async function samples(now) {
  const { origin, samples: found } = await getJson(address("/samples")).catch(() => ({ samples: [] }));
  if (now !== chosen || found.length === 0) return;
  byId("sample-list").replaceChildren(
    ...found.map(({ title, thumbnail }, number) =>
      h("li", {},
        h("button", { type: "button", onclick: () => take(number, title) },
          h("img", { src: thumbnail, alt: "" }), h("span", {}, title)))),
  );
  byId("sample-origin").textContent = origin;
  byId("samples").hidden = false;
}

async function take(number, title) {
  try {
    const answer = await get(address(`/samples/${number}`));
    give(await answer.blob(), `sample “${title}”`);
  } catch (error) {
    tell("alert", error);
  }
}

// A picture by button, by drop, or from the clipboard.

byId("file").addEventListener("change", ({ target }) => {
  if (target.files.length) give(target.files[0], target.files[0].name);
  target.value = ""; // so that the same file can be chosen again
});

const files = (transfer) => [...(transfer?.files ?? [])];
const drop = byId("drop");
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault(); // a file that misses the box must not replace the page
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => event.relatedTarget === null && drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  received(files(event.dataTransfer), "What was dropped is no file. Save the picture, and drop the file.");
});
document.addEventListener("paste", (event) => {
  if (event.target instanceof HTMLInputElement) return;
  received(files(event.clipboardData), "The clipboard holds no picture.");
});

function received(found, otherwise) {
  if (byId("columns").hidden) return; // nobody is in yet
  if (found.length === 1) give(found[0], found[0].name);
  else tell("alert", new Refused(422, found.length ? "Give one picture at a time" : otherwise.replace(/\.$/, ""), 0));
}

function give(blob, name) {
  if (picture) URL.revokeObjectURL(picture.url);
  picture = { blob, name, url: URL.createObjectURL(blob) };
  const preview = byId("preview");
  preview.hidden = true;
  preview.onload = () => {
    preview.hidden = false;
    preview.classList.toggle("small", Math.max(preview.naturalWidth, preview.naturalHeight) < 64);
  };
  preview.src = picture.url;
  ask();
}

byId("again").addEventListener("click", ask);
byId("stop").addEventListener("click", () => asking?.abort());

function offerAgain() {
  byId("again").hidden = !picture;
  byId("again").textContent = picture ? `Ask about ${picture.name} again` : "";
}

async function ask() {
  asking?.abort();
  const mine = (asking = new AbortController());
  quiet("alert");
  byId("answer").hidden = byId("again").hidden = true;
  if (picture.blob.size > server.most_bytes) {
    // Such an upload would be cut off before the server's words arrive.
    byId("status").textContent = "";
    tell("alert", new Refused(413, `the file has ${size(picture.blob.size)}, and the server takes up to ${size(server.most_bytes)}`, 0));
    return;
  }
  const form = new FormData();
  form.append("image", picture.blob, "picture"); // a file's name is nobody's business
  waiting(`Uploading ${picture.name} …`, 0);
  try {
    const answer = await post(`${address("/classify")}&zero_shot=true`, form, {
      signal: mine.signal,
      progress: (share) => asking === mine && waiting(share < 1 ? `Uploading, ${percent(share, 0)}` : "The prompt is reading the picture …", share),
    });
    if (asking !== mine) return;
    who.left_today = Math.max(0, who.left_today - 1);
    show(who, server);
    tellAnswer(answer.pictures[0], answer.mark);
  } catch (error) {
    if (asking !== mine) return;
    const stopped = error.name === "AbortError";
    byId("status").textContent = stopped ? "Stopped." : "";
    if (stopped) offerAgain();
    else {
      if ([0, 408, 429, 503].includes(error.status)) offerAgain();
      tell("alert", error);
    }
  } finally {
    if (asking === mine) {
      asking = null;
      byId("progress").hidden = true;
    }
  }
}

function waiting(text, share) {
  byId("status").textContent = text;
  byId("progress").hidden = false;
  if (share < 1) byId("bar").value = share;
  else byId("bar").removeAttribute("value"); // for as long as that takes
}

const shown = (probability) => percent(probability, Math.max(0, server.digits - 2));

function tellAnswer({ classes, zero_shot: written }, mark) {
  const learned = new Map(classes.map(({ name, probability }) => [name, probability]));
  const other = new Map(written.map(({ name, probability }) => [name, probability]));
  const names = [...new Set([...learned.keys(), ...other.keys()])];
  const below = `not among its first ${classes.length}`;
  const cell = (kind, values, name) =>
    values.has(name)
      ? h("td", {}, h("span", { class: "value" }, shown(values.get(name))), bar(kind, values.get(name)))
      : h("td", {}, h("span", { class: "none" }, below));
  byId("ranked").replaceChildren(
    ...names.map((name) =>
      h("tr", {}, h("th", { scope: "row" }, name), cell("learned", learned, name), cell("written", other, name))),
  );
  const [best, second] = [classes[0], written[0]];
  const agree = best.name === second.name;
  byId("verdict").replaceChildren(
    h("strong", {}, best.name), ` with ${shown(best.probability)}`, mark && h("span", { class: "tag" }, mark),
    h("span", { class: "beside" },
      agree ? `Hand-written words say so too, with ${shown(second.probability)}.` : `Hand-written words say ${second.name}, with ${shown(second.probability)}.`),
  );
  const used = manifest?.training?.words ?? "a photo of a";
  byId("answer-words").textContent =
    `The ${counted(classes.length, "class", "classes")} that each finds most probable. Hand-written: “${used} …” before the class’s name.`;
  byId("answer").hidden = false;
  byId("answer").scrollIntoView({ block: "nearest" }); // on a phone it is below the samples
  byId("status").textContent = `Answer to ${picture.name}: ${best.name}, ${shown(best.probability)}.`;
  offerAgain();
  byId("again").hidden = true;
}

function bar(kind, share) {
  const filled = h("span", { class: kind });
  filled.style.width = `${100 * share}%`;
  return h("span", { class: "bar", "aria-hidden": "true" }, filled);
}

const title = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

// The card: what the signed manifest says.

function card(found, mark) {
  const { privacy, training } = found;
  byId("mark").hidden = !mark;
  byId("mark").textContent = mark ? `This prompt is marked ${mark}` : "";
  const owner = found.client === null ? "shared by all clients" : `client ${found.client}’s own`;
  byId("card-body").replaceChildren(
    h("p", { class: "title" }, h("strong", {}, found.name), ` version ${found.version}`),
    ...(mark ? [h("p", { class: "banner" }, mark)] : []),
    h("p", {}, "Learned by ", h("code", {}, found.method), ` (${owner}) for the encoder `, h("code", {}, found.encoder.name), "."),
    part("Privacy", guarantee(privacy, mark), h("p", { class: "statement" }, privacy.statement)),
    part("Attacks", ...attacks(found)),
    ...(training ? [part("Accuracy", accuracy(training))] : []),
    part("Who published it",
      h("dl", {},
        h("dt", {}, "Key"), h("dd", {}, h("code", { class: "print" }, found.publisher)),
        h("dt", {}, "When"), h("dd", {}, h("time", { datetime: found.created }, found.created.replace("T", " ").replace("Z", " UTC"))),
        ...(training ? [h("dt", {}, "Trained on"), h("dd", {}, `${training.dataset}, ${counted(training.clients, "client")}, ${counted(training.rounds, "round")}`)] : [])),
      h("p", { class: "hint" }, "This server trusts the key, and has checked the signature over all of the above.")),
    part("How it may be used", use(found)),
  );
}

const part = (title, ...content) => h("section", { class: "part" }, h("h3", {}, title), ...content);

function guarantee({ private: kept, epsilon, delta, unit, simulated }, mark) {
  if (epsilon === null || mark === "NOT PRIVATE" || (!kept && !simulated)) {
    return h("p", { class: "figure exposed" }, "No guarantee");
  }
  if (epsilon === 0) return h("p", { class: `figure${mark ? " exposed" : ""}` }, "Nothing was released");
  return h("div", {},
    h("p", { class: `figure${mark ? " exposed" : ""}` }, `ε = ${roundedUp(epsilon)}`, simulated && h("small", {}, " of the simulated noise")),
    h("p", { class: "under" }, `${delta === null ? "" : `δ = ${roundedUp(delta)}, `}for each ${unit ?? "example"}`));
}

function attacks({ audit, training }) {
  if (audit === null) {
    const known = training === null ? "Published without its run; whether it was attacked is not known here." : "No attack on the run was tried.";
    return [h("p", {}, known)];
  }
  const items = Object.entries(audit.attacks).map(([name, { found, epsilon }]) =>
    h("li", {}, h("strong", {}, title(name)), epsilon !== null && h("span", { class: "tag" }, `ε is at least ${Number(epsilon.toPrecision(3))}`),
      ...found.map((line) => h("span", { class: "line" }, line))));
  return [
    ...(audit.refuted ? [h("p", { class: "banner" }, "An attack contradicts the claim.")] : []),
    h("ul", { class: "attacks" }, items),
    h("p", { class: "hint" }, "An attack that finds nothing proves nothing."),
  ];
}

function accuracy({ accuracy: learned, hand_written: written, of }) {
  const row = (title, values) =>
    h("tr", {}, h("th", { scope: "row" }, title), ...MEASURES.map((name) => h("td", {}, values[name] === null ? n_a() : percent(values[name]))));
  return h("table", { class: "figures" },
    h("caption", {}, `On test pictures, ${of === "client" ? "of the prompt’s own client" : "means over clients"}. Local: a client’s own classes. Neighbor: the others.`),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Prompt"), ...["Local", "Neighbor", "Overall"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, row("Learned", learned), written && row("Hand-written", written)));
}

function use({ class_names: names, name, version }) {
  const told = `${counted(server.most_top, "class", "classes")}, with ${counted(server.digits, "decimal")} each`;
  const path = new URL(`v1/prompts/${name}/classify?version=${version}`, location.href);
  return h("div", {},
    h("ul", {},
      h("li", {}, `It sorts pictures into ${counted(names.length, "class", "classes")}, `,
        "and names one of them even where a picture shows something else."),
      h("li", {}, `This server tells at most ${told}. Exact numbers would make the prompt easy to copy.`),
      h("li", {}, `Your limit: ${counted(who.per_minute, "request")} a minute, ${counted(who.per_day, "picture")} a day.`),
      h("li", {}, "Its manifest names no license. Ask the publisher before you pass it on.")),
    h("details", {}, h("summary", {}, "Its classes"), h("p", {}, names.join(", "))),
    h("details", {}, h("summary", {}, "In a program"),
      h("pre", { tabindex: "0" }, h("code", {}, `curl -F image=@picture.png ${server.needs_key ? '-H "Authorization: Bearer $KEY" ' : ""}\\\n  '${path}'`))));
}
