#include "hook/edit.h"

#include "base/cleanup.h"
#include "config.h"
#include "hook/json.h"
#include "hook/rootfs.h"

#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>

#define EDITS_MAX 1024
#define EDITS_KEPT 32 /* for what must be done */

/* Bytes to be replaced; `text` is owned. */
struct edit {
    uint32_t at, remove;
    char *text;
};

struct job {
    struct bn_json j;
    const char *agent;
    uint32_t mounts, env; /* BN_JSON_NONE: the configuration has none */
    struct edit edits[EDITS_MAX];
    size_t n;
    char *why;
    size_t why_len;
};

static void job_free(struct job *job)
{
    for (size_t i = 0; i < job->n; i++)
        free(job->edits[i].text);
    bn_json_free(&job->j);
}

__attribute__((format(printf, 3, 4))) static int say(struct job *job, int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(job->why, job->why_len, fmt, ap);
    va_end(ap);
    return code;
}

/* --- edits --------------------------------------------------------------------------------------------------------- */

__attribute__((format(printf, 4, 5))) static int replace(struct job *job, uint32_t at, uint32_t remove,
                                                         const char *fmt, ...)
{
    va_list ap;
    char *text = NULL;
    if (job->n == EDITS_MAX)
        return -E2BIG;
    va_start(ap, fmt);
    int len = vasprintf(&text, fmt, ap);
    va_end(ap);
    if (len < 0)
        return -ENOMEM;
    /* In the order of their places; those of one place in the order in which they were asked for. */
    size_t i = job->n++;
    for (; i > 0 && job->edits[i - 1].at > at; i--)
        job->edits[i] = job->edits[i - 1];
    job->edits[i] = (struct edit){at, remove, text};
    return 0;
}

static int replace_token(struct job *job, uint32_t token, const char *value)
{
    const struct bn_json_token *t = &job->j.tokens[token];
    bn_auto_free char *quoted = bn_json_quote(value);
    return quoted ? replace(job, t->start, t->end - t->start, "%s", quoted) : -ENOMEM;
}

/* `text`, complete JSON, as the last element of an array. */
static int append(struct job *job, uint32_t array, const char *text)
{
    const struct bn_json_token *t = &job->j.tokens[array];
    bool comma = t->children > 0;
    for (size_t i = 0; i < job->n; i++)
        comma = comma || (job->edits[i].at == t->end - 1 && job->edits[i].remove == 0);
    return replace(job, t->end - 1, 0, "%s%s", comma ? "," : "", text);
}

static int apply(const struct job *job, size_t len, char **out, size_t *out_len)
{
    size_t size = len + 1, from = 0;
    for (size_t i = 0; i < job->n; i++)
        size += strlen(job->edits[i].text);
    char *text = malloc(size), *o = text;
    if (!text)
        return -ENOMEM;
    for (size_t i = 0; i < job->n; i++) {
        const struct edit *e = &job->edits[i];
        o = mempcpy(o, job->j.text + from, e->at - from);
        o = stpcpy(o, e->text);
        from = e->at + e->remove;
    }
    o = mempcpy(o, job->j.text + from, len - from);
    *o = 0;
    *out = text;
    *out_len = (size_t)(o - text);
    return 1;
}

/* --- what the configuration says ----------------------------------------------------------------------------------- */

/* Each element of an array; none if there is no such array. */
#define FOR_EACH(j, i, array)                                                                    \
    for (uint32_t i = bn_json_first(j, array); i != BN_JSON_NONE && i < (j)->tokens[array].next; \
         i = (j)->tokens[i].next)

static char *member_string(const struct bn_json *j, uint32_t object, const char *name)
{
    return bn_json_string(j, bn_json_member(j, object, name, BN_JSON_STRING));
}

static bool is_bind_mount(const struct bn_json *j, uint32_t mount)
{
    uint32_t options = bn_json_member(j, mount, "options", BN_JSON_ARRAY);
    if (bn_json_is(j, bn_json_member(j, mount, "type", BN_JSON_STRING), "bind"))
        return true;
    FOR_EACH(j, i, options)
    {
        if (bn_json_is(j, i, "bind") || bn_json_is(j, i, "rbind"))
            return true;
    }
    return false;
}

static bool has_prefix(const char *text, const char *prefix)
{
    return text && strncmp(text, prefix, strlen(prefix)) == 0;
}

/* Any `member` of the objects of this array that begins with `prefix`. */
static bool any_begins(const struct bn_json *j, uint32_t array, const char *member, const char *prefix)
{
    FOR_EACH(j, i, array)
    {
        bn_auto_free char *text = member_string(j, i, member);
        if (has_prefix(text, prefix))
            return true;
    }
    return false;
}

/* NVIDIA's own hook, which mounts the driver when the container is made. */
static bool has_nvidia_hook(const struct bn_json *j)
{
    static const char *const stages[] = {"prestart", "createRuntime", "createContainer"};
    uint32_t hooks = bn_json_member(j, 0, "hooks", BN_JSON_OBJECT);
    for (size_t s = 0; s < BN_ARRAY_SIZE(stages); s++) {
        uint32_t stage = bn_json_member(j, hooks, stages[s], BN_JSON_ARRAY);
        FOR_EACH(j, i, stage)
        {
            bn_auto_free char *path = member_string(j, i, "path");
            const char *slash = path ? strrchr(path, '/') : NULL;
            if (has_prefix(slash, "/nvidia-container-") || has_prefix(slash, "/nvidia-ctk") ||
                has_prefix(slash, "/nvidia-cdi-hook"))
                return true;
        }
    }
    return false;
}

/* Images bear this variable whether or not they are given a GPU: it counts only with somebody there to act on it. */
static bool names_visible_devices(const struct job *job)
{
    static const char name[] = "NVIDIA_VISIBLE_DEVICES=";
    FOR_EACH(&job->j, i, job->env)
    {
        bn_auto_free char *text = bn_json_string(&job->j, i);
        const char *value = has_prefix(text, name) ? text + sizeof(name) - 1 : NULL;
        if (value && *value && strcmp(value, "void") != 0 && strcmp(value, "none") != 0)
            return true;
    }
    return false;
}

static bool asks_for_gpus(const struct job *job)
{
    const struct bn_json *j = &job->j;
    uint32_t linux_part = bn_json_member(j, 0, "linux", BN_JSON_OBJECT);
    uint32_t devices = bn_json_member(j, linux_part, "devices", BN_JSON_ARRAY);
    struct stat st;
    return any_begins(j, devices, "path", "/dev/nvidia") ||
           any_begins(j, job->mounts, "destination", "/dev/nvidia") ||
           (names_visible_devices(job) && (has_nvidia_hook(j) || stat("/dev/nvidiactl", &st) == 0));
}

/* --- mount: the agent in the place of the driver ------------------------------------------------------------------------- */

struct driver_mount {
    uint32_t mount, source, destination; /* tokens */
    unsigned major;
};

/* Mounts of a driver's library that programs of this architecture load; *agent: one is the agent already. */
static int find_driver_mounts(const struct job *job, struct driver_mount *found, size_t cap, size_t *n,
                              bool *agent)
{
    const struct bn_json *j = &job->j;
    *n = 0;
    *agent = false;
    FOR_EACH(j, i, job->mounts)
    {
        struct driver_mount m = {.mount = i,
                                 .source = bn_json_member(j, i, "source", BN_JSON_STRING),
                                 .destination = bn_json_member(j, i, "destination", BN_JSON_STRING)};
        bn_auto_free char *source = bn_json_string(j, m.source);
        bn_auto_free char *destination = bn_json_string(j, m.destination);
        if (!source || !destination || !is_bind_mount(j, i))
            continue;
        if (strcmp(destination, BENNU_CONTAINER_DRIVER) == 0 ||
            strcmp(destination, BENNU_CONTAINER_AGENT) == 0)
            *agent = true;
        if (!bn_driver_name(destination))
            continue;
        enum bn_driver_file what = bn_driver_file(source, job->agent, &m.major);
        *agent = *agent || what == BN_DRIVER_AGENT;
        if (what != BN_DRIVER_REAL)
            continue;
        if (*n == cap)
            return -E2BIG;
        found[(*n)++] = m;
    }
    return 0;
}

#define AGENT_MOUNT                                        \
    "{\"destination\":%s,\"type\":\"bind\",\"source\":%s," \
    "\"options\":[\"ro\",\"nosuid\",\"nodev\",\"bind\",\"rprivate\"]}"

/* As `bennu run` does: libuv takes io_uring where it finds it, which CRIU cannot save; it falls back to threads. */
static int without_io_uring(struct job *job)
{
    FOR_EACH(&job->j, i, job->env)
    {
        bn_auto_free char *text = bn_json_string(&job->j, i);
        if (has_prefix(text, "UV_USE_IO_URING="))
            return 0;
    }
    return job->env == BN_JSON_NONE ? 0 : append(job, job->env, "\"UV_USE_IO_URING=0\"");
}

/* CDI's mounts have no type, and crun crashes on those when it restores a container (1.21): the specification of the runtime lets
 * it be left out, and to leave it out means the same. */
static int name_types(struct job *job)
{
    const struct bn_json *j = &job->j;
    int r = 0;
    FOR_EACH(j, i, job->mounts)
    {
        if (bn_json_member(j, i, "type", BN_JSON_STRING) != BN_JSON_NONE || !is_bind_mount(j, i))
            continue;
        if (r < 0 || job->n >= EDITS_MAX - EDITS_KEPT)
            break;
        r = replace(job, j->tokens[i].start + 1, 0, "\"type\":\"bind\",");
    }
    return r;
}

static int mount_over(struct job *job, const struct driver_mount *m, size_t n)
{
    const struct bn_json_token *first = &job->j.tokens[m[0].mount], *name = &job->j.tokens[m[0].destination];
    bn_auto_free char *source = bn_json_quote(job->agent);
    int r = source ? replace_token(job, m[0].destination, BENNU_CONTAINER_DRIVER) : -ENOMEM;
    bn_auto_free char *destination = strndup(job->j.text + name->start, name->end - name->start);
    if (r == 0 && !destination)
        r = -ENOMEM;
    if (r == 0)
        r = replace(job, first->end, 0, "," AGENT_MOUNT, destination, source);
    for (size_t i = 1; i < n && r == 0; i++)
        r = replace_token(job, m[i].source, job->agent);
    return r;
}

/* --- preload ----------------------------------------------------------------------------------------------------------- */

static bool listed(const char *list, const char *path)
{
    size_t len = strlen(path);
    for (const char *at = list; *at; at += strcspn(at, ": "), at += strspn(at, ": ")) {
        if (strcspn(at, ": ") == len && memcmp(at, path, len) == 0)
            return true;
    }
    return false;
}

static int set_preload(struct job *job)
{
    static const char name[] = "LD_PRELOAD=";
    uint32_t last = BN_JSON_NONE;
    FOR_EACH(&job->j, i, job->env)
    {
        bn_auto_free char *text = bn_json_string(&job->j, i);
        if (has_prefix(text, name))
            last = i;
    }
    if (last == BN_JSON_NONE)
        return append(job, job->env, "\"LD_PRELOAD=" BENNU_CONTAINER_AGENT "\"");
    bn_auto_free char *text = bn_json_string(&job->j, last), *value = NULL;
    const char *old = text ? text + sizeof(name) - 1 : "";
    if (text && listed(old, BENNU_CONTAINER_AGENT))
        return 0;
    if (!text || asprintf(&value, "%s%s%s%s", name, BENNU_CONTAINER_AGENT, *old ? ":" : "", old) < 0)
        return -ENOMEM;
    return replace_token(job, last, value);
}

static int preload(struct job *job)
{
    bn_auto_free char *source = bn_json_quote(job->agent), *mount = NULL;
    if (!source || asprintf(&mount, AGENT_MOUNT, "\"" BENNU_CONTAINER_AGENT "\"", source) < 0)
        return -ENOMEM;
    int r = set_preload(job);
    return r < 0 ? r : append(job, job->mounts, mount);
}

/* --- the decision ------------------------------------------------------------------------------------------------------- */

enum wish { WISH_NONE, WISH_OFF, WISH_PRELOAD };

static enum wish wish_of(const struct bn_json *j)
{
    uint32_t annotations = bn_json_member(j, 0, "annotations", BN_JSON_OBJECT);
    uint32_t value = bn_json_member(j, annotations, BN_HOOK_ANNOTATION, BN_JSON_STRING);
    return bn_json_is(j, value, "off")       ? WISH_OFF
           : bn_json_is(j, value, "preload") ? WISH_PRELOAD
                                             : WISH_NONE;
}

static int open_root(const struct job *job)
{
    uint32_t root = bn_json_member(&job->j, 0, "root", BN_JSON_OBJECT);
    bn_auto_free char *path = member_string(&job->j, root, "path");
    return path && path[0] == '/' ? bn_rootfs_open(path) : -1;
}

/* Can the agent's mount point be made, and is the agent there? 1: yes. */
static int check_places(struct job *job, int root)
{
    struct stat st;
    if (stat(job->agent, &st) < 0 || !S_ISREG(st.st_mode))
        return say(job, -ENOENT, "no agent at %s: run 'bennu install' again", job->agent);
    if (root >= 0 && !bn_rootfs_takes_mounts(root, BENNU_CONTAINER_DIR))
        return say(job, 0,
                   "no agent for this container: its root is on a read-only file system without a "
                   "folder " BENNU_CONTAINER_DIR);
    return 1;
}

static int decide_preload(struct job *job, int root, bool forced)
{
    bool glibc = root >= 0 && bn_rootfs_has_glibc(root);
    if (!forced && !glibc)
        return say(job, 0, "no agent for this container: %s",
                   root < 0 ? "its root folder cannot be looked into"
                   : bn_rootfs_has_musl(root)
                       ? "its C library is musl, for which NVIDIA has no driver library"
                       : "its image has no glibc");
    if (job->mounts == BN_JSON_NONE || job->env == BN_JSON_NONE)
        return say(job, -EBADMSG, "the configuration has no list of mounts or no environment");
    int r = check_places(job, root);
    if (r <= 0)
        return r;
    r = preload(job);
    return r == 0 ? without_io_uring(job) : r;
}

static int give_agent(struct job *job, enum wish wish, const struct driver_mount *found, size_t n)
{
    bn_auto_fd root = open_root(job);
    /* An image may bring a newer libcuda than the machine's and have it loaded first: then that one is the real driver, and
     * a place fixed to the machine's would be wrong. */
    bool compat = n > 0 && root >= 0 && found[0].major && bn_rootfs_compat_driver(root) > found[0].major;
    if (wish == WISH_PRELOAD || n == 0 || compat)
        return decide_preload(job, root, wish == WISH_PRELOAD);
    int r = check_places(job, root);
    if (r <= 0)
        return r;
    r = mount_over(job, found, n);
    return r == 0 ? without_io_uring(job) : r;
}

static int decide(struct job *job)
{
    struct driver_mount found[8];
    size_t n;
    bool agent;
    enum wish wish = wish_of(&job->j);
    int r = find_driver_mounts(job, found, BN_ARRAY_SIZE(found), &n, &agent);
    if (r < 0)
        return say(job, r, "it mounts a libcuda more than %zu times", BN_ARRAY_SIZE(found));
    if (!agent && wish != WISH_PRELOAD && n == 0 && !asks_for_gpus(job))
        return 0;
    if (!agent && wish != WISH_OFF)
        r = give_agent(job, wish, found, n);
    /* Also for one without the agent: the driver's path is to work there. */
    if (r == 0)
        r = name_types(job);
    return r < 0 ? r : job->n > 0;
}

int bn_hook_edit(const char *text, size_t len, const struct bn_hook_options *options, char **out,
                 size_t *out_len, char *why, size_t why_len)
{
    struct job job = {.agent = options->agent, .why = why, .why_len = why_len};
    why[0] = 0;
    int r = bn_json_scan(text, len, &job.j);
    if (r < 0)
        return say(&job, r, "the configuration cannot be read: %s", strerror(-r));
    uint32_t process = bn_json_member(&job.j, 0, "process", BN_JSON_OBJECT);
    job.mounts = bn_json_member(&job.j, 0, "mounts", BN_JSON_ARRAY);
    job.env = bn_json_member(&job.j, process, "env", BN_JSON_ARRAY);
    r = decide(&job);
    if (r > 0)
        r = apply(&job, len, out, out_len);
    if (r < 0 && !why[0])
        say(&job, r, "the configuration cannot be edited: %s", strerror(-r));
    job_free(&job);
    return r;
}
