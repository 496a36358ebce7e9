// What both pages share: the key of this tab, requests and their refusals in words, and elements made without markup.

const STORED = "sordino-key";
let memory = "";

export const key = {
  get() {
    try {
      return sessionStorage.getItem(STORED) ?? memory;
    } catch {
      return memory; // a browser may forbid storage
    }
  },
  set(secret) {
    memory = secret;
    try {
      if (secret) sessionStorage.setItem(STORED, secret);
      else sessionStorage.removeItem(STORED);
    } catch {
      // it is in memory, then
    }
  },
};

export class Refused extends Error {
  constructor(status, reason, seconds) {
    super(reason);
    Object.assign(this, { status, reason, seconds });
  }
}

const reasonIn = (text) => {
  try {
    return JSON.parse(text).error ?? "";
  } catch {
    return "";
  }
};

const authorization = () => (key.get() ? { Authorization: `Bearer ${key.get()}` } : {});

export async function get(path) {
  let answer;
  try {
    answer = await fetch(path, { headers: authorization(), cache: "no-store" });
  } catch {
    throw new Refused(0, "", 0);
  }
  if (!answer.ok) {
    throw new Refused(answer.status, reasonIn(await answer.text()), Number(answer.headers.get("Retry-After")) || 0);
  }
  return answer;
}

export const getJson = async (path) => (await get(path)).json();

// Sends a form. `fetch` tells nothing of an upload's progress, so this is the older way.
export function post(path, form, { progress, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => event.lengthComputable && progress(event.loaded / event.total));
    request.addEventListener("load", () => {
      if (request.status === 200) resolve(JSON.parse(request.responseText));
      else {
        const seconds = Number(request.getResponseHeader("Retry-After")) || 0;
        reject(new Refused(request.status, reasonIn(request.responseText), seconds));
      }
    });
    request.addEventListener("error", () => reject(new Refused(0, "", 0)));
    request.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

// Every refusal in words: what happened, and what one can do.
export function words({ status, reason, seconds }) {
  const said = reason ? `${reason[0].toUpperCase()}${reason.slice(1)}.` : "";
  const later = seconds ? `Try again in ${duration(seconds)}.` : "Try again later.";
  const scope = /scope '(\w+)'/.exec(reason)?.[1];
  switch (status) {
    case 0:
      return ["The server did not answer", "It cannot be reached, or it closed the connection. Check that it runs."];
    case 401:
      return ["The key was refused", "It is mistyped, or was revoked. Give another one."];
    case 403: {
      const lacks = { read: "list prompts and read cards", classify: "ask about pictures" }[scope] ?? "do this";
      return ["This key may not do that", `It lacks the scope “${scope ?? "?"}”, so it may not ${lacks}. Ask the server’s operator.`];
    }
    case 404:
      return ["Not there", `${said} Reload the page to see what is.`];
    case 408:
      return ["This took too long", "The upload was cut off. Take a smaller picture, or a faster connection."];
    case 409:
      return ["This prompt cannot be asked", said];
    case 410:
      return ["Withdrawn", `${said} Choose another version.`];
    case 413:
      return ["The picture is too large", `${said} Scale it down.`];
    case 415:
      return ["No picture of a known kind", said];
    case 422:
      return ["The picture cannot be read", said];
    case 429:
      return reason.includes("a day")
        ? ["Today’s budget is used", `${said} Pictures count by day, in UTC. ${later}`]
        : ["Too many requests", `${said} ${later}`];
    case 503:
      return ["The server cannot answer now", `${said} ${seconds ? later : ""}`.trim()];
    default:
      return [`The server refused (${status})`, said];
  }
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} seconds`;
  if (seconds < 5400) return `${Math.ceil(seconds / 60)} minutes`;
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.ceil((seconds % 3600) / 60)];
  return minutes ? `${hours} h ${minutes} min` : `${hours} h`;
}

export const byId = (id) => document.getElementById(id);

// h("td", {class: "number"}, "12 %"): children are text or elements; no text is ever read as markup.
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function tell(place, error) {
  const [title, text] = error instanceof Refused ? words(error) : ["The page failed", String(error)];
  byId(place).replaceChildren(h("div", { class: "message" }, h("strong", {}, title), text && h("span", {}, text)));
  byId(place).scrollIntoView({ block: "nearest" });
  if (error.status === 401 && place !== "key-alert") askForKey(); // it was revoked while the page was open
  if (!(error instanceof Refused)) throw error;
}

function askForKey() {
  key.set("");
  byId("key-box").hidden = false;
  byId("key").value = "";
  byId("key").focus();
}

export const quiet = (...places) => places.forEach((place) => byId(place).replaceChildren());

export const counted = (number, noun, plural = `${noun}s`) => `${number.toLocaleString("en")} ${number === 1 ? noun : plural}`;

export const percent = (value, digits = 1) =>
  value === null || value === undefined ? "n/a" : `${(100 * value).toFixed(digits)}%`;

export const n_a = () => h("span", { class: "none" }, "n/a");

// Three digits, never less than the value: a privacy loss must not look smaller than it is.
export function roundedUp(value) {
  if (value === 0) return "0";
  let rounded = Number(value.toPrecision(3));
  if (rounded < value) rounded = Number((rounded + 10 ** (Math.floor(Math.log10(value)) - 2)).toPrecision(3));
  return rounded < 1e-3 ? rounded.toExponential() : String(rounded);
}

export function size(bytes) {
  const units = ["B", "kB", "MB", "GB"];
  const step = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(bytes, 1)) / 3));
  return `${(bytes / 1000 ** step).toFixed(step && bytes / 1000 ** step < 100 ? 1 : 0)} ${units[step]}`;
}

// Finds out whether the server asks for a key, and calls `ready(server, key)` once there is one that holds.
export async function enter(ready) {
  const [box, form, input] = ["key-box", "key-form", "key"].map(byId);
  let server;
  try {
    server = await getJson("v1/server");
  } catch (error) {
    tell("page-alert", error);
    return;
  }
  if (byId("to-runs")) byId("to-runs").hidden = !server.runs;

  const open = async () => {
    quiet("key-alert", "page-alert");
    try {
      const who = await getJson("v1/key");
      box.hidden = true;
      show(who, server);
      await ready(server, who);
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        tell("key-alert", error);
        askForKey();
      } else tell(box.hidden ? "page-alert" : "key-alert", error);
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(input.value.trim());
    open();
  });
  byId("forget").addEventListener("click", () => {
    key.set("");
    location.reload();
  });
  if (server.needs_key && !key.get()) askForKey();
  else await open();
}

export function show(who, server) {
  const left = byId("drop") && `${counted(who.left_today, "picture")} left today`; // of interest where one asks
  byId("who-words").textContent = [server.needs_key && who.name, left].filter(Boolean).join(" · ");
  byId("forget").hidden = !server.needs_key;
  byId("who").hidden = false;
}
