/* Libraries that are no driver: one bears the agent's mark. */
#define EXPORT __attribute__((visibility("default")))
EXPORT int cuInit(unsigned flags);
EXPORT int cuInit(unsigned flags)
{
    return 0;
}
#ifdef FAKE_AGENT
EXPORT const char *bn_agent_version(void);
EXPORT const char *bn_agent_version(void)
{
    return "0";
}
#endif
