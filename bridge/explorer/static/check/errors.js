// Why a block is refused.

/** A rule that does not hold. `reason` is the rule's name; the message says what was found, and what was expected. */
export class BrokenRule extends Error {
  constructor(reason, message) {
    super(message);
    this.reason = reason;
  }
}

/** A certificate that breaks a rule of SPEC.md. `reason` is what the node calls it, bad-traincert-... */
export class CertificateError extends BrokenRule {
  constructor(reason, message) {
    super(`bad-traincert-${reason}`, message);
  }
}
