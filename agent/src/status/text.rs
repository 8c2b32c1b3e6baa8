//! The status of a node on one screen.
//!
//! Problems come first, then one entry for each part of the agent. What says
//! nothing is left out: a counter that is zero, a part that is not in use.
//! Whatever the agent took from objects is made plain before it is laid out.

use anstyle::{AnsiColor, Style};
use ferrule_api::status::{
    Audit, Draining, Drift, Health, ObjectCondition, Packets, PodStatus, Problem, Programmed,
    SourceStatus, Status, SysctlStatus,
};
use textwrap::{Options, WordSplitter};

use crate::status::words::{addresses, ago, count, key, plain, short_span, span};

/// Column in which the values of entries begin.
const VALUES: usize = 13;

/// Most conditions and node addresses that are listed; JSON has all.
const LISTED: usize = 8;

/// Narrower than this a hanging indent leaves no room; lines grow instead.
const NARROWEST: usize = 32;

/// How text looks: for which width, in which colours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// Columns.
    pub(super) width: usize,
    /// Colours.
    pub(super) palette: Palette,
}

/// What each colour is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Palette {
    pub(super) good: Style,
    pub(super) bad: Style,
    pub(super) warning: Style,
    pub(super) label: Style,
}

impl Palette {
    /// No colours.
    pub(super) const PLAIN: Self = Self {
        good: Style::new(),
        bad: Style::new(),
        warning: Style::new(),
        label: Style::new(),
    };

    /// Colours that every terminal has, so that its owner's theme holds.
    pub(super) const COLOURED: Self = Self {
        good: AnsiColor::Green.on_default().bold(),
        bad: AnsiColor::Red.on_default().bold(),
        warning: AnsiColor::Yellow.on_default(),
        label: AnsiColor::Cyan.on_default(),
    };
}

/// Text in one style, which ends before a line does.
pub(super) fn paint(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// The whole screen, a newline at its end.
pub(super) fn render(status: &Status, look: &Look) -> String {
    let mut page = Page::new(look);
    let agent = format!(
        "ferrule-agent {}, up {}",
        plain(&status.agent_version),
        span(status.now.saturating_sub(status.started))
    );
    let node = plain(&status.node);
    match status.health {
        Health::Healthy => page.headline("healthy", look.palette.good, &format!("{node}  {agent}")),
        Health::Degraded => {
            let problems = count(status.problem_count, "problem");
            page.headline("DEGRADED", look.palette.bad, &format!("{node}: {problems}"));
        }
    }
    if !status.problems.is_empty() {
        page.blank();
        page.problems(status);
    }
    page.blank();
    if status.health == Health::Degraded {
        page.entry("agent", &[agent.into()]);
    }
    page.entry("source", &source(&status.source, status.now));
    page.entry("programmed", &programmed(&status.programmed));
    page.entry("last change", &last_change(status));
    page.entry("pods", &pods(&status.pods));
    page.entry("draining", &draining(&status.draining));
    page.entry("drift", &drift(&status.drift, status.now));
    page.entry("audit", &audit(&status.audit, status.now));
    page.entry("packets", &packets(&status.packets));
    page.entry("sysctls", &sysctls(&status.sysctls));
    page.entry(
        "conditions",
        &conditions(&status.conditions, status.condition_count),
    );
    page.text
}

/// A value, or a part of one that begins on a line of its own.
struct Paragraph {
    text: String,
    /// Whether somebody should look at it.
    warning: bool,
}

impl From<String> for Paragraph {
    fn from(text: String) -> Self {
        Self {
            text,
            warning: false,
        }
    }
}

impl Paragraph {
    fn warning(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            warning: true,
        }
    }
}

/// Stands for a blank at which a line is not broken.
const GLUE: char = '\u{a0}';

/// The text with each number glued to what follows it, most often its unit.
fn glued(text: &str) -> String {
    let mut glued = String::with_capacity(text.len());
    for char in text.chars() {
        let behind_number = glued.ends_with(|last: char| last.is_ascii_digit());
        glued.push(if char == ' ' && behind_number {
            GLUE
        } else {
            char
        });
    }
    glued
}

/// The screen as far as it is written.
struct Page {
    look: Look,
    text: String,
}

impl Page {
    fn new(look: &Look) -> Self {
        Self {
            look: Look {
                width: look.width.max(NARROWEST),
                palette: look.palette,
            },
            text: String::new(),
        }
    }

    fn blank(&mut self) {
        self.text.push('\n');
    }

    /// Text that is wrapped, each line in `style` behind `column` blanks, the
    /// first behind `label` instead.
    fn hanging(&mut self, label: (&str, Style), column: usize, text: &str, style: Style) {
        let options = Options::new(self.look.width.saturating_sub(column))
            // A name with hyphens that is torn apart cannot be copied.
            .word_splitter(WordSplitter::NoHyphenation);
        let (label, label_style) = label;
        let gap = column.saturating_sub(textwrap::core::display_width(label));
        for (index, line) in textwrap::wrap(&glued(text), options).iter().enumerate() {
            let line = line.replace(GLUE, " ");
            if index == 0 && !label.is_empty() {
                self.text.push_str(&paint(label_style, label));
                self.text.push_str(&" ".repeat(gap));
            } else {
                self.text.push_str(&" ".repeat(column));
            }
            self.text.push_str(&paint(style, &line));
            self.text.push('\n');
        }
    }

    fn headline(&mut self, health: &str, style: Style, text: &str) {
        self.hanging((health, style), health.len() + 2, text, Style::new());
    }

    /// A label and its value; nothing where there is no value.
    fn entry(&mut self, label: &str, value: &[Paragraph]) {
        for (index, paragraph) in value.iter().enumerate() {
            let label = if index == 0 { label } else { "" };
            let style = if paragraph.warning {
                self.look.palette.warning
            } else {
                Style::new()
            };
            self.hanging(
                (label, self.look.palette.label),
                VALUES,
                &paragraph.text,
                style,
            );
        }
    }

    fn problems(&mut self, status: &Status) {
        for problem in &status.problems {
            self.problem(problem, status.now);
        }
        let more = status.problem_count.saturating_sub(status.problems.len());
        if more > 0 {
            let text = format!(
                "and {} that the agent does not list",
                count(more, "more problem")
            );
            self.hanging(("", Style::new()), 0, &text, Style::new());
        }
    }

    fn problem(&mut self, problem: &Problem, now: u64) {
        let object = plain(&problem.object);
        let since = match now.saturating_sub(problem.since) {
            0 => "since just now".to_owned(),
            seconds => format!("for {}", span(seconds)),
        };
        let tried = match problem.attempts {
            0 => String::new(),
            1 => ", tried once".to_owned(),
            attempts => format!(", tried {attempts} times"),
        };
        let head = format!("{object}, {since}{tried}");
        let plain_style = Style::new();
        self.hanging(("", plain_style), 0, &head, self.look.palette.bad);
        self.hanging(("", plain_style), 4, &plain(&problem.problem), plain_style);
        if !problem.remedy.is_empty() {
            let remedy = format!("remedy: {}", plain(&problem.remedy));
            self.hanging(("", plain_style), 4, &remedy, plain_style);
        }
    }
}

/// Counts with their nouns, those that are zero left out.
fn counts(counted: &[(usize, &str)]) -> Vec<String> {
    counted
        .iter()
        .filter(|(number, _)| *number > 0)
        .map(|(number, noun)| count(*number, noun))
        .collect()
}

fn source(source: &SourceStatus, now: u64) -> Vec<Paragraph> {
    let mut objects = counts(&[
        (source.services, "Service"),
        (source.endpoint_slices, "EndpointSlice"),
        (source.nodes, "Node"),
        (source.service_cidrs, "ServiceCIDR"),
    ])
    .join(", ");
    if objects.is_empty() {
        "nothing there".clone_into(&mut objects);
    }
    let event = source
        .last_event
        .map(|at| format!("; last event {}", ago(now, at)))
        .unwrap_or_default();
    let mut value = vec![format!("{}: {objects}{event}", plain(&source.name)).into()];
    if !source.complete {
        value.push(Paragraph::warning(
            "not read completely yet: nothing is removed until it is",
        ));
    }
    value
}

fn programmed(programmed: &Programmed) -> Vec<Paragraph> {
    let services = counts(&[
        (programmed.services, "Service"),
        (programmed.frontends, "frontend"),
    ])
    .join(", ");
    let refused: Vec<String> = [
        (programmed.rejecting, "without endpoints, refused"),
        (programmed.dropping, "without endpoints here, dropped"),
    ]
    .into_iter()
    .filter(|(number, _)| *number > 0)
    .map(|(number, words)| format!("{number} {words}"))
    .collect();
    let refused = match refused.as_slice() {
        [] => String::new(),
        some => format!(" ({})", some.join("; ")),
    };
    let kernel = counts(&[
        (programmed.virtual_services, "virtual service"),
        (programmed.real_servers, "real server"),
        (programmed.vips, "VIP"),
        (programmed.routes, "route"),
    ])
    .join(", ");
    let host_ports = match programmed.host_ports {
        0 => String::new(),
        number => format!("{} on host ports of pods", count(number, "frontend")),
    };
    let lines = [
        services + &refused,
        kernel,
        node_ports(programmed),
        host_ports,
    ];
    let mut value: Vec<Paragraph> = lines
        .into_iter()
        .filter(|text| !text.is_empty())
        .map(Paragraph::from)
        .collect();
    if value.is_empty() {
        value.push("nothing".to_owned().into());
    }
    if programmed.pending > 0 {
        let pending = count(programmed.pending, "change");
        value.push(Paragraph::warning(format!("{pending} pending")));
    }
    value
}

fn node_ports(programmed: &Programmed) -> String {
    if programmed.node_ports == 0 {
        return String::new();
    }
    let frontends = count(programmed.node_ports, "frontend");
    let addresses: Vec<_> = programmed
        .node_addresses
        .iter()
        .take(LISTED)
        .map(|address| plain(address))
        .collect();
    let addresses = addresses.join(", ");
    match programmed.node_addresses.len().saturating_sub(LISTED) {
        _ if addresses.is_empty() => format!("{frontends} on node ports"),
        0 => format!("{frontends} on node ports of {addresses}"),
        more => format!("{frontends} on node ports of {addresses} and {more} more"),
    }
}

fn last_change(status: &Status) -> Vec<Paragraph> {
    let Some(change) = &status.last_change else {
        return Vec::new();
    };
    let text = format!(
        "{}: {}, {} from seen to kernel, {} of it in the kernel",
        ago(status.now, change.at),
        count(change.steps, "step"),
        short_span(change.seen_to_kernel),
        short_span(change.kernel),
    );
    vec![text.into()]
}

fn pods(pods: &PodStatus) -> Vec<Paragraph> {
    if pods.leases == 0 && pods.ranges.is_empty() {
        return Vec::new();
    }
    let leases: Paragraph = count(pods.leases, "lease").into();
    let ranges = pods.ranges.iter().map(|range| Paragraph {
        text: format!(
            "{}: {} used, {} free",
            plain(&range.range),
            addresses(range.used),
            addresses(range.free)
        ),
        warning: range.free == 0,
    });
    let tidied = TIDIED.iter().filter_map(|(key, words)| {
        let times = *pods.tidied.get(*key)?;
        Some(format!("{words}: {times} since the agent started").into())
    });
    std::iter::once(leases)
        .chain(ranges)
        .chain(tidied)
        .collect()
}

/// What housekeeping counts, and in words.
const TIDIED: [(&str, &str); 5] = [
    (
        "adopted",
        "pods without a lease that got one (but not their host ports, until they are made anew)",
    ),
    ("released", "leases without a pod that ended"),
    ("removed", "half-made interfaces removed"),
    ("routed", "lost routes to pods made anew"),
    (
        "failed",
        "attempts to put leases or interfaces right that failed",
    ),
];

fn draining(draining: &Draining) -> Vec<Paragraph> {
    let mut value = Vec::new();
    if draining.backends > 0 {
        let oldest = draining
            .oldest
            .map(|oldest| format!(", the oldest for {}", short_span(oldest)))
            .unwrap_or_default();
        let text = format!(
            "{} with old connections{oldest}; {} after the last sight of one they end",
            count(draining.backends, "leaving backend"),
            short_span(draining.bound),
        );
        value.push(text.into());
    }
    if draining.failed > 0 {
        let text = format!(
            "flows to backends that are gone could not be looked for {} times",
            draining.failed
        );
        value.push(Paragraph::warning(text));
    }
    value
}

fn drift(drift: &Drift, now: u64) -> Vec<Paragraph> {
    let total = drift
        .repaired
        .values()
        .fold(0_u64, |sum, count| sum.saturating_add(*count));
    if total == 0 {
        return vec!["none".to_owned().into()];
    }
    let kinds: Vec<String> = nonzero(&drift.repaired).collect();
    let mut value = vec![format!("{total} repaired: {}", kinds.join(", ")).into()];
    if let Some(last) = &drift.last {
        let when = drift
            .last_at
            .map(|at| format!(" {}", ago(now, at)))
            .unwrap_or_default();
        value.push(format!("last{when}: {}", plain(last)).into());
    }
    value
}

/// Counters as people read them, those that are zero left out.
fn nonzero(counters: &std::collections::BTreeMap<String, u64>) -> impl Iterator<Item = String> {
    counters
        .iter()
        .filter(|(_, number)| **number > 0)
        .map(|(name, number)| format!("{} {number}", key(name)))
}

fn audit(audit: &Audit, now: u64) -> Vec<Paragraph> {
    let mut value = Vec::new();
    if audit.total > 0 {
        let round = audit.rounds.saturating_add(1);
        let length = audit
            .round_estimate
            .or(audit.last_round)
            .map(|seconds| format!("; a full round takes {}", short_span(seconds)))
            .unwrap_or_default();
        let text = format!(
            "round {round}: {} of {} compared{length} at {} % of a core",
            audit.done,
            count(audit.total, "virtual service"),
            audit.budget_percent,
        );
        value.push(text.into());
    }
    let compared = |what: &str, at: Option<u64>| at.map(|at| format!("{what} {}", ago(now, at)));
    let looks: Vec<String> = [
        compared("services", audit.services_at),
        compared("nftables", audit.filter_at),
    ]
    .into_iter()
    .flatten()
    .collect();
    if !looks.is_empty() {
        value.push(format!("last compared: {}", looks.join(", ")).into());
    }
    value
}

fn packets(packets: &Packets) -> Vec<Paragraph> {
    let counters: Vec<String> = nonzero(&packets.counters).collect();
    let masqueraded: Vec<String> = nonzero(&packets.masqueraded).collect();
    let mut value = Vec::new();
    if !counters.is_empty() {
        value.push(counters.join(", ").into());
    }
    if !masqueraded.is_empty() {
        value.push(format!("masqueraded: {}", masqueraded.join(", ")).into());
    }
    value
}

fn sysctls(sysctls: &[SysctlStatus]) -> Vec<Paragraph> {
    let mut set = Vec::new();
    let mut value = Vec::new();
    for sysctl in sysctls {
        let before = sysctl.before.as_deref().map(plain);
        let (name, to) = (&sysctl.name, plain(&sysctl.value));
        match (&sysctl.problem, before) {
            (None, None) => set.push(format!("{name} {to}")),
            (None, Some(before)) => set.push(format!("{name} {to} (was {before})")),
            (Some(problem), before) => {
                let stays = before.map_or_else(String::new, |before| format!(", stays {before}"));
                let problem = plain(problem);
                let text = format!("{name} not set to {to}{stays}: {problem}");
                value.push(Paragraph::warning(text));
            }
        }
    }
    if !set.is_empty() {
        value.insert(0, format!("{} set: {}", set.len(), set.join(", ")).into());
    }
    value
}

fn conditions(listed: &[ObjectCondition], total: usize) -> Vec<Paragraph> {
    if total == 0 && listed.is_empty() {
        return Vec::new();
    }
    let shown = listed.len().min(LISTED);
    let mut value = vec![format!("{} served only in part", count(total, "object")).into()];
    value.extend(listed.iter().take(shown).map(|condition| {
        Paragraph::from(format!(
            "{}: {}: {}",
            plain(&condition.object),
            plain(&condition.reason),
            plain(&condition.message)
        ))
    }));
    let more = total.saturating_sub(shown);
    if more > 0 {
        value.push(format!("and {more} more; -o json lists {}", listed.len()).into());
    }
    value
}
