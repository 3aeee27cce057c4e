/* Reading JSON without changing it: the text is cut into tokens that remember where they lie, so that an edit touches the bytes it
 * is about and no others. A container's configuration holds numbers that no JSON library of C keeps (a limit of 2^64-1), and
 * members that nobody here knows.
 *
 * The text is hostile: everything is checked, nesting is limited, nothing recurses. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum bn_json_type { BN_JSON_OBJECT, BN_JSON_ARRAY, BN_JSON_STRING, BN_JSON_OTHER };

struct bn_json_token {
    enum bn_json_type type;
    uint32_t start, end; /* with the quotes or brackets */
    uint32_t next;       /* index of the token after this one and all in it */
    uint32_t children;   /* elements of an array; members of an object, each being two tokens */
};

struct bn_json {
    const char *text; /* borrowed */
    struct bn_json_token *tokens;
    uint32_t n;
};

#define BN_JSON_NONE UINT32_MAX
#define BN_JSON_TEXT_MAX (8u << 20)
#define BN_JSON_DEPTH_MAX 64

/* -EBADMSG: not one JSON value, or nested too deeply. -EFBIG: longer than BN_JSON_TEXT_MAX. -ENOMEM. Free with bn_json_free. */
int bn_json_scan(const char *text, size_t len, struct bn_json *out);
void bn_json_free(struct bn_json *j);

/* Value of member `name` of the object at index `object`; BN_JSON_NONE when it has none, or `object` is BN_JSON_NONE or no
 * object of type `type` is there. Of members of the same name the last counts, as it does for Go. */
uint32_t bn_json_member(const struct bn_json *j, uint32_t object, const char *name, enum bn_json_type type);
/* First element of an array (or key of an object) at `i`, to be followed with tokens[].next; BN_JSON_NONE: it is empty. */
uint32_t bn_json_first(const struct bn_json *j, uint32_t i);
/* A string's value (malloced, with a NUL after it; caller frees). NULL: it is none, holds a NUL, or there is no memory. */
char *bn_json_string(const struct bn_json *j, uint32_t i);
/* Is the string at `i` this one? */
bool bn_json_is(const struct bn_json *j, uint32_t i, const char *text);
/* `text` as a JSON string with its quotes (malloced; caller frees); bytes above 127 as they are. NULL: no memory. */
char *bn_json_quote(const char *text);
