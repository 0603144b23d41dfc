// How connections end, in words. The codes are those of RFC 6455 and of wsbroadcast.close_codes.

const OTHERS = {
  1000: "left",
  1001: "left the page",
  1003: "was closed: it sent data of a wrong type",
  1005: "left",
  1006: "lost the connection",
  1007: "was closed: it sent data that the demo doesn't understand",
  1008: "was closed: it broke a rule",
  1009: "was closed: its message was too large",
  1011: "was closed: the server failed",
  1012: "was closed: the server restarts",
  1013: "was evicted for reading nothing",
};

const OWN = {
  1000: "Closed",
  1001: "The server has stopped",
  1003: "Closed: this tab sent data of a wrong type",
  1006: "Connection lost",
  1007: "Closed: this tab sent data that the server doesn't understand",
  1008: "Closed: this tab broke a rule",
  1009: "Closed: the message of this tab was too large",
  1011: "Closed: the server failed",
  1012: "The server restarts",
  1013: "Evicted: this tab read nothing",
};

// Ends that the user wanted. They need no explanation.
const WANTED = new Set([1000, 1001, 1005]);

// A server that doesn't accept a registered code sends it plus 3,000.
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
