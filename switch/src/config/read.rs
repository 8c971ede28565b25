//! Walks a parsed TOML document and collects values and mistakes side by side, so
//! that one run names everything that is wrong.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};
use vhost_pci_device::abi;

use super::{
    Account, Admission, Config, Confine, DEFAULT_CONFIRM_TIMEOUT, DEFAULT_MAX_MAPPINGS,
    DEFAULT_MEMORY_REGIONS, DEFAULT_WINDOW, LinkConfig, MAX_LINKS, MAX_MAX_MAPPINGS, MAX_MEMORY_REGIONS,
    MAX_RATE, MAX_SOCKET_PATH, MAX_WINDOW, Mistake, OneWay, Rates, WiringPolicy, parse_size,
};
use crate::kind::{Device, KINDS, Keys, Kind};
use crate::link::message::Flood;

/// Confirmation timeouts that make sense, milliseconds.
const TIMEOUT_MS: std::ops::RangeInclusive<u64> = 10..=60_000;
/// The longest name of a link, bytes.
const MAX_NAME: usize = 64;

/// The keys of a link that do not depend on the kind of its device.
const LINK_KEYS: [&str; 19] = [
    "name",
    "owner_socket",
    "peer_socket",
    "window",
    "profile",
    "one_way",
    "max_mappings",
    "memory_regions",
    "unsealed_memory",
    "migration",
    "messages_per_second",
    "notifications_per_second",
    "connections_per_second",
    "wiring",
    "doorbell_socket",
    "owner_users",
    "owner_groups",
    "peer_users",
    "peer_groups",
];

struct Reader<'t> {
    text: &'t str,
    mistakes: Vec<Mistake>,
    /// Where each socket path was named first.
    sockets: BTreeMap<PathBuf, usize>,
}

/// A table whose known keys are taken out one by one; what is left is a mistake.
struct Table<'t> {
    line: usize,
    what: &'static str,
    entries: BTreeMap<String, (usize, Spanned<DeValue<'t>>)>,
}

pub(super) fn config(text: &str) -> Result<Config, Vec<Mistake>> {
    let (document, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader { text, mistakes: Vec::new(), sockets: BTreeMap::new() };
    for error in errors {
        let line = error.span().map_or(1, |span| reader.line_of(span));
        reader.mistake(line, error.message().to_string());
    }
    let config = reader.document(document);
    let mut mistakes = reader.mistakes;
    mistakes.sort_by_key(|mistake| mistake.line);
    match config {
        Some(config) if mistakes.is_empty() => Ok(config),
        _ => Err(mistakes),
    }
}

impl<'t> Reader<'t> {
    fn line_of(&self, span: Range<usize>) -> usize {
        let end = span.start.min(self.text.len());
        1 + self.text.as_bytes()[..end].iter().filter(|b| **b == b'\n').count()
    }

    fn mistake(&mut self, line: usize, message: impl Into<String>) {
        self.mistakes.push(Mistake { line, message: message.into() });
    }

    fn table(&self, what: &'static str, line: usize, table: DeTable<'t>) -> Table<'t> {
        let entries = table
            .into_iter()
            .map(|(key, value)| {
                let line = self.line_of(key.span());
                (key.into_inner().into_owned(), (line, value))
            })
            .collect();
        Table { line, what, entries }
    }

    fn document(&mut self, document: Spanned<DeTable<'t>>) -> Option<Config> {
        let mut top = self.table("the file", 1, document.into_inner());
        let control_socket = self.socket(&mut top, "control_socket");
        let group = self.string(&mut top, "group").map(|(_, group)| group);
        let confirm_timeout = match self.integer(&mut top, "confirm_timeout_ms") {
            Some((line, ms)) if !TIMEOUT_MS.contains(&ms) => {
                self.mistake(
                    line,
                    format!(
                        "confirm_timeout_ms is {ms}; it must be from {} to {}",
                        TIMEOUT_MS.start(),
                        TIMEOUT_MS.end()
                    ),
                );
                None
            }
            Some((_, ms)) => Some(Duration::from_millis(ms)),
            None => Some(DEFAULT_CONFIRM_TIMEOUT),
        };
        let confine = self.confine(&mut top);
        let links = self.links(&mut top);
        self.unknown(top, &["control_socket", "group", "confirm_timeout_ms", "confine", "[[link]]"]);
        Some(Config {
            control_socket: control_socket?,
            group,
            confirm_timeout: confirm_timeout?,
            confine: confine?,
            links,
        })
    }

    fn confine(&mut self, table: &mut Table<'t>) -> Option<Confine> {
        let Some((line, value)) = table.entries.remove("confine") else {
            return Some(Confine::default());
        };
        match value.get_ref() {
            DeValue::Boolean(true) => return Some(Confine::BestEffort),
            DeValue::Boolean(false) => return Some(Confine::Off),
            DeValue::String(text) if text == "require" => return Some(Confine::Require),
            _ => {}
        }
        self.mistake(line, "confine must be true, false or \"require\"");
        None
    }

    fn links(&mut self, top: &mut Table<'t>) -> Vec<LinkConfig> {
        let Some((line, value)) = top.entries.remove("link") else {
            self.mistake(1, "there is no [[link]]; a broker needs at least one");
            return Vec::new();
        };
        let DeValue::Array(array) = value.into_inner() else {
            self.mistake(line, "links are written as [[link]], one such table for each");
            return Vec::new();
        };
        if array.len() > MAX_LINKS {
            self.mistake(line, format!("there are {} links; a broker has at most {MAX_LINKS}", array.len()));
        }
        let mut names = BTreeMap::new();
        let mut links = Vec::new();
        for element in array {
            let line = self.line_of(element.span());
            let DeValue::Table(table) = element.into_inner() else {
                self.mistake(line, "a link is a table: [[link]] with name, owner_socket and peer_socket");
                continue;
            };
            let table = self.table("a [[link]]", line, table);
            if let Some(link) = self.link(table, &mut names) {
                links.push(link);
            }
        }
        links
    }

    fn link(&mut self, mut table: Table<'t>, names: &mut BTreeMap<String, usize>) -> Option<LinkConfig> {
        let name = self.name(&mut table, names);
        let owner_socket = self.socket(&mut table, "owner_socket");
        let peer_socket = self.socket(&mut table, "peer_socket");
        let window_len = self.window(&mut table);
        let kind = self.kind(&mut table);
        let device = self.device(&mut table, kind);
        let one_way = self.one_way(&mut table);
        let max_mappings = self.count(&mut table, "max_mappings", DEFAULT_MAX_MAPPINGS, MAX_MAX_MAPPINGS);
        let memory_regions =
            self.count(&mut table, "memory_regions", DEFAULT_MEMORY_REGIONS, MAX_MEMORY_REGIONS);
        let unsealed_memory = self.flag(&mut table, "unsealed_memory");
        let migration = self.flag_or(&mut table, "migration", true);
        let rates = self.rates(&mut table);
        let wiring = self.wiring(&mut table);
        let doorbell_line = table.entries.get("doorbell_socket").map(|(line, _)| *line);
        let doorbell_socket = match table.entries.contains_key("doorbell_socket") {
            true => self.socket(&mut table, "doorbell_socket").map(Some),
            false => Some(None),
        };
        if wiring == Some(WiringPolicy::Relay) && matches!(doorbell_socket, Some(Some(_))) {
            let line = doorbell_line.unwrap_or(table.line);
            self.mistake(
                line,
                "wiring is \"relay\": no doorbell function would be used; leave doorbell_socket out",
            );
        }
        let owner_admission = self.admission(&mut table, "owner_users", "owner_groups");
        let peer_admission = self.admission(&mut table, "peer_users", "peer_groups");
        table.what = kind.map_or(table.what, |kind| kind.table);
        self.unknown(table, &[&LINK_KEYS, kind.unwrap_or(KINDS[0]).keys].concat());
        Some(LinkConfig {
            name: name?,
            owner_socket: owner_socket?,
            peer_socket: peer_socket?,
            window_len: window_len?,
            device: device?,
            one_way: one_way?,
            max_mappings: max_mappings?,
            memory_regions: memory_regions?,
            unsealed_memory: unsealed_memory?,
            migration: migration?,
            rates: rates?,
            wiring: wiring?,
            doorbell_socket: doorbell_socket?,
            owner_admission: owner_admission?,
            peer_admission: peer_admission?,
        })
    }

    fn rates(&mut self, table: &mut Table<'t>) -> Option<Rates> {
        let default = Rates::default();
        let mut rate = |flood: Flood, default: u32| {
            let found = self.count(table, flood.key(), default as usize, MAX_RATE);
            found.and_then(|rate| u32::try_from(rate).ok())
        };
        let messages = rate(Flood::Messages, default.messages);
        let notifications = rate(Flood::Notifications, default.notifications);
        let connections = rate(Flood::Connections, default.connections);
        Some(Rates { messages: messages?, notifications: notifications?, connections: connections? })
    }

    fn name(&mut self, table: &mut Table<'t>, names: &mut BTreeMap<String, usize>) -> Option<String> {
        let (line, name) = self.required(table, "name")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
            self.mistake(
                line,
                format!("the name '{name}' must be 1 to {MAX_NAME} letters, digits, '-', '_' or '.'"),
            );
            return None;
        }
        if let Some(first) = names.insert(name.clone(), line) {
            self.mistake(line, format!("a link is named '{name}' already, in line {first}"));
            return None;
        }
        Some(name)
    }

    fn window(&mut self, table: &mut Table<'t>) -> Option<u64> {
        let Some((line, text)) = self.string(table, "window") else {
            return Some(DEFAULT_WINDOW);
        };
        match parse_size(&text) {
            Err(error) => self.mistake(line, format!("window: {error}")),
            Ok(len) if !len.is_power_of_two() || len <= abi::DATA_OFFSET || len > MAX_WINDOW => self.mistake(
                line,
                format!(
                    "window is \"{text}\"; a PCI BAR's length is a power of two, here from \"4M\" to \"64T\""
                ),
            ),
            Ok(len) => return Some(len),
        }
        None
    }

    fn kind(&mut self, table: &mut Table<'t>) -> Option<&'static Kind> {
        if !table.entries.contains_key("profile") {
            return Some(KINDS[0]);
        }
        let (line, name) = self.string(table, "profile")?;
        let found = KINDS.into_iter().find(|kind| kind.name == name);
        if found.is_none() {
            let known = KINDS.map(|kind| kind.name).join(", ");
            self.mistake(line, format!("there is no profile '{name}'; known: {known}"));
        }
        found
    }

    /// Where the kind is not known, mistakes in the keys of the most common one are told all the same.
    fn device(&mut self, table: &mut Table<'t>, kind: Option<&'static Kind>) -> Option<Device> {
        let device = (kind.unwrap_or(KINDS[0]).read)(&mut LinkKeys { reader: self, table });
        kind.and(device)
    }

    fn one_way(&mut self, table: &mut Table<'t>) -> Option<OneWay> {
        let Some((line, name)) = self.string(table, "one_way") else {
            return Some(OneWay::default());
        };
        let found = OneWay::ALL.into_iter().find(|policy| policy.name() == name);
        if found.is_none() {
            let known = OneWay::ALL.map(OneWay::name).join("\", \"");
            self.mistake(line, format!("one_way is \"{name}\"; it must be one of \"{known}\""));
        }
        found
    }

    fn wiring(&mut self, table: &mut Table<'t>) -> Option<WiringPolicy> {
        let Some((line, name)) = self.string(table, "wiring") else {
            return Some(WiringPolicy::default());
        };
        let found = WiringPolicy::ALL.into_iter().find(|policy| policy.name() == name);
        if found.is_none() {
            let known = WiringPolicy::ALL.map(WiringPolicy::name).join("\", \"");
            self.mistake(line, format!("wiring is \"{name}\"; it must be one of \"{known}\""));
        }
        found
    }

    fn admission(&mut self, table: &mut Table<'t>, users: &str, groups: &str) -> Option<Admission> {
        let (users, groups) = (self.accounts(table, users), self.accounts(table, groups));
        Some(Admission { users: users?, groups: groups? })
    }

    /// A list of names and numbers; empty if the key is not there.
    fn accounts(&mut self, table: &mut Table<'t>, key: &str) -> Option<Vec<Account>> {
        let Some((line, value)) = table.entries.remove(key) else { return Some(Vec::new()) };
        let DeValue::Array(array) = value.into_inner() else {
            self.mistake(line, format!("{key} is a list, as in {key} = [\"vm1\", 1001]"));
            return None;
        };
        if array.is_empty() {
            let who = "leave it out to admit whoever the socket's mode lets connect";
            self.mistake(line, format!("{key} names nobody: {who}"));
            return None;
        }
        let mut accounts = Vec::new();
        for element in array {
            accounts.push(match element.into_inner() {
                DeValue::String(name) => Account::Name(name.into_owned()),
                // The last number stands for "none" (chown(2)).
                DeValue::Integer(number) => match u32::from_str_radix(number.as_str(), number.radix()) {
                    Ok(number) if number != u32::MAX => Account::Number(number),
                    _ => {
                        self.mistake(
                            line,
                            format!("{key}: {} is not a user's or group's number", number.as_str()),
                        );
                        return None;
                    }
                },
                _ => {
                    self.mistake(line, format!("{key} has names in quotes or numbers"));
                    return None;
                }
            });
        }
        Some(accounts)
    }

    fn socket(&mut self, table: &mut Table<'t>, key: &str) -> Option<PathBuf> {
        let (line, text) = self.required(table, key)?;
        let path = PathBuf::from(&text);
        if !path.is_absolute() || path.file_name().is_none() {
            self.mistake(line, format!("{key} is \"{text}\"; it must be the absolute path of a socket"));
        } else if text.len() > MAX_SOCKET_PATH {
            self.mistake(
                line,
                format!("{key} is {} bytes long; a socket's path has at most {MAX_SOCKET_PATH}", text.len()),
            );
        } else if let Some(first) = self.sockets.insert(path.clone(), line) {
            self.mistake(line, format!("the socket \"{text}\" is used already, in line {first}"));
        } else {
            return Some(path);
        }
        None
    }

    fn required(&mut self, table: &mut Table<'t>, key: &str) -> Option<(usize, String)> {
        if !table.entries.contains_key(key) {
            self.mistake(table.line, format!("{} needs {key}", table.what));
        }
        self.string(table, key)
    }

    fn string(&mut self, table: &mut Table<'t>, key: &str) -> Option<(usize, String)> {
        let (line, value) = table.entries.remove(key)?;
        match value.into_inner() {
            DeValue::String(text) => Some((line, text.into_owned())),
            other => {
                self.mistake(line, format!("{key} is a {}; it must be a string in quotes", other.type_str()));
                None
            }
        }
    }

    fn integer(&mut self, table: &mut Table<'t>, key: &str) -> Option<(usize, u64)> {
        let (line, value) = table.entries.remove(key)?;
        let number = match value.get_ref() {
            DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix()).ok(),
            _ => None,
        };
        if number.is_none() {
            self.mistake(line, format!("{key} must be a whole number, not negative"));
        }
        number.map(|number| (line, number))
    }

    /// From 1 to `most`; `default` unless the file says otherwise.
    fn count(&mut self, table: &mut Table<'t>, key: &str, default: usize, most: usize) -> Option<usize> {
        if !table.entries.contains_key(key) {
            return Some(default);
        }
        let (line, number) = self.integer(table, key)?;
        let found = usize::try_from(number).ok().filter(|number| (1..=most).contains(number));
        if found.is_none() {
            self.mistake(line, format!("{key} is {number}; it must be from 1 to {most}"));
        }
        found
    }

    /// `false` unless the file says otherwise.
    fn flag(&mut self, table: &mut Table<'t>, key: &str) -> Option<bool> {
        self.flag_or(table, key, false)
    }

    fn flag_or(&mut self, table: &mut Table<'t>, key: &str, default: bool) -> Option<bool> {
        let Some((line, value)) = table.entries.remove(key) else { return Some(default) };
        let flag = value.get_ref().as_bool();
        if flag.is_none() {
            self.mistake(line, format!("{key} must be true or false, without quotes"));
        }
        flag
    }

    fn unknown(&mut self, table: Table<'t>, known: &[&str]) {
        for (key, (line, _)) in table.entries {
            self.mistake(line, format!("{} has no key '{key}'; known: {}", table.what, known.join(", ")));
        }
    }
}

/// The keys of one link, for the kind of its device.
struct LinkKeys<'r, 't> {
    reader: &'r mut Reader<'t>,
    table: &'r mut Table<'t>,
}

impl Keys for LinkKeys<'_, '_> {
    fn count(&mut self, key: &str, default: u16, most: u16) -> Option<u16> {
        let found = self.reader.count(self.table, key, default.into(), most.into());
        found.and_then(|count| u16::try_from(count).ok())
    }

    fn flag(&mut self, key: &str) -> Option<bool> {
        self.reader.flag(self.table, key)
    }

    fn size(&mut self, key: &str, check: fn(u64) -> Result<(), String>) -> Option<u64> {
        let (line, text) = self.reader.required(self.table, key)?;
        let size = parse_size(&text).map_err(|error| error.to_string());
        match size.and_then(|bytes| check(bytes).map(|()| bytes)) {
            Ok(bytes) => Some(bytes),
            Err(reason) => {
                self.reader.mistake(line, format!("{key}: {reason}"));
                None
            }
        }
    }
}
