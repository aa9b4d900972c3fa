// The conversation: what was said, the reply that streams in, stop and errors.

import { rememberKey, streamChat } from "./api.js";

const find = (id) => document.getElementById(id);

export class Chat {
  constructor(onWork) {
    this.turns = [];
    this.stopper = null;
    this.onWork = onWork; // told true when a reply begins and false when it ends
    find("message-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    find("message").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    find("stop").addEventListener("click", () => this.stop());
    find("clear").addEventListener("click", () => this.clear());
    find("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      rememberKey(find("key").value);
      find("key-form").hidden = true;
      find("message").focus();
    });
  }

  async send() {
    const box = find("message");
    const text = box.value.trim();
    if (!text || this.stopper) return;
    box.value = "";
    this.turns.push({ role: "user", content: text });
    const asked = this.show("user", "You", text);
    const reply = this.show("assistant", "Model", "");
    const content = reply.appendChild(document.createElement("span"));
    this.working(new AbortController());
    try {
      await this.receive(content);
      if (!content.textContent) this.note(reply, "The reply is empty.");
      this.turns.push({ role: "assistant", content: content.textContent });
    } catch (error) {
      if (error.name === "AbortError") {
        this.note(reply, "Stopped.");
        this.turns.push({ role: "assistant", content: content.textContent });
      } else {
        this.turns.pop(); // so that the message can be sent again
        asked.remove();
        if (!content.textContent) reply.remove();
        if (!box.value) box.value = text;
        this.fail(error);
      }
    } finally {
      this.working(null);
    }
  }

  async receive(content) {
    const body = {
      messages: this.turns,
      temperature: find("temperature").valueAsNumber,
      max_tokens: find("tokens").valueAsNumber,
    };
    for await (const piece of streamChat(body, this.stopper.signal)) {
      const log = find("log");
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      content.textContent += piece;
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  }

  stop() {
    this.stopper?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    find("log").replaceChildren();
    find("message").focus();
  }

  working(stopper) {
    this.stopper = stopper;
    find("stop").disabled = !stopper;
    find("send").disabled = Boolean(stopper);
    find("log").setAttribute("aria-busy", String(Boolean(stopper))); // read out when complete, not word by word
    this.onWork(Boolean(stopper));
  }

  show(kind, who, text) {
    find("hint")?.remove();
    const turn = document.createElement("div");
    turn.className = `turn ${kind}`;
    const name = turn.appendChild(document.createElement("span"));
    name.className = "who";
    name.textContent = who;
    turn.append(text);
    find("log").append(turn);
    turn.scrollIntoView({ block: "end" });
    return turn;
  }

  note(turn, text) {
    const note = turn.appendChild(document.createElement("span"));
    note.className = "note";
    note.textContent = ` ${text}`;
  }

  fail(error) {
    const box = document.createElement("p");
    box.className = "error";
    box.setAttribute("role", "alert");
    box.textContent = error.message;
    find("log").append(box);
    box.scrollIntoView({ block: "end" });
    if (error.status === 401) {
      find("key-form").hidden = false;
      find("key").focus();
    }
  }
}
