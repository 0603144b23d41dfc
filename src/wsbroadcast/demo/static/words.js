// How connections end, in words. The codes are those of RFC 6455 and of wsbroadcast.close_codes.

const OTHERS = {
  1000: "left",
  1001: "left the page",
  1003: "was closed for sending what the demo doesn't read",
  1005: "left",
  1006: "lost the connection",
  1007: "was closed for sending what the demo doesn't understand",
  1008: "was closed for breaking a rule",
  1009: "was closed for sending too large a message",
  1011: "was closed: the server failed",
  1012: "was closed: the server restarts",
  1013: "was evicted for reading nothing",
};

const OWN = {
  1000: "Closed",
  1001: "The server has ended",
  1003: "Closed: the server doesn't read what this tab sent",
  1006: "Connection lost",
  1007: "Closed: the server doesn't understand what this tab sent",
  1008: "Closed: this tab broke a rule",
  1009: "Closed: this tab sent too large a message",
  1011: "Closed: the server failed",
  1012: "The server restarts",
  1013: "Evicted: this tab read nothing",
};

// Those that are no news: whoever leaves like this meant to.
const WANTED = new Set([1000, 1001, 1005]);

// A server that refuses one of the registered codes sends it moved up by 3,000.
export function registered(code) {
  return code > 4000 && code < 4016 ? code - 3000 : code;
}

export function howOthersEnd(code) {
  return OTHERS[registered(code)] ?? `was closed with code ${code}`;
}

export function howThisTabEnds(code) {
  return OWN[registered(code)] ?? `Closed with code ${code}`;
}

export function isWanted(code) {
  return WANTED.has(code);
}
